from sampling.pipeline import load_pipeline  # noqa: F401 - the name that users import
