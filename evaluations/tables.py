"""Describe runs in words, average over seeds, format tables. Imports nothing slow."""
import json
import math
import statistics

# Settings ignored when runs are compared: names, paths, speed, and how often files are written.
SILENT = ("exp_name", "output_dir", "logging_dir", "report_to", "preset", "resume_step", "num_workers", "epochs",
          "data", "processes", "environment", "noise_stream", "log_every", "sampling_steps", "checkpointing_steps",
          "checkpoint_minutes", "keep_checkpoints", "keep_every", "compile", "fused_attn", "allow_tf32",
          "grad_checkpointing", "teacher_cache", "class_names", "early_stop_fraction", "prediction",
          "conditions", "legacy")
SILENT_BEGINNINGS = ("eval_", "wandb_")
# Settings that do nothing without alignment, and without a teacher.
ALIGNMENT = ("enc_", "attn_", "encoder_depth", "early_stop", "trigger_", "align_", "projector", "spatial_norm")
TEACHER = ("enc_", "attn_", "projector", "spatial_norm")
# Settings described in words by value; all others are shown as flags.
WORDS = {"model": "{}", "seed": "seed {:d}", "enc_type": "aligned with {}",
         "early_stop_point": "alignment until step {:,}", "max_train_steps": "{:,} steps",
         "batch_size": "batches of {:,}", "learning_rate": "learning rate {:g}",
         "proj_coeff": "{:g} x feature loss", "attn_coeff": "{:g} x attention loss", "resolution": "{:d} px",
         "early_stop_trigger": "alignment ended by the {}", "mixed_precision": "precision {}", "ema_decay": "EMA {:g}"}
NONE = {"proj_coeff": "no feature loss", "attn_coeff": "no attention loss", "mixed_precision": "float32",
        "enc_type": "no teacher"}  # 0, "no", "none"

MODES = {"ode": "Euler", "sde": "Euler-Maruyama", "dpm": "DPM-Solver++", "dopri5": "adaptive Dormand-Prince"}


def phrase(name, value):
    """A setting in words."""
    if name in NONE and value in (0, "no", "none"):
        return NONE[name]
    if name in WORDS and isinstance(value, str if WORDS[name].count("{}") else (int, float)):
        return WORDS[name].format(value)
    plain = name.replace("_", " ")
    if isinstance(value, bool):
        return plain if value else f"no {plain}"
    return f"{plain} {value if isinstance(value, (str, int, float)) else json.dumps(value)}"


def is_aligned(settings):
    """Whether the run trains an alignment loss: --NAME-coeff or, in an older args.json, a teacher."""
    weights = [value for name, value in settings.items() if name.endswith("_coeff")]
    return any(weights) if weights else settings.get("enc_type", "none") != "none"


def applies(name, settings):
    """Whether the setting `name` has an effect: alignment and teacher settings need alignment or a teacher."""
    of_alignment = name.endswith("_coeff") or name.startswith(ALIGNMENT)
    of_teacher = name.startswith(TEACHER) and name != "enc_type"
    return ((is_aligned(settings) or not of_alignment)
            and (settings.get("enc_type", "none") != "none" or not of_teacher))


def differing(settings, but=()):
    """Names of the settings that differ between runs, except `but`; `settings`: one dict (args.json) per run."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if name not in (*SILENT, *but) and not name.startswith(SILENT_BEGINNINGS)
            and len({json.dumps(each.get(name)) for each in settings if applies(name, each)}) > 1]


def labels(settings, but=()):
    """For each run, its differing settings in words; "" where runs are alike."""
    names, found = differing(settings, but), []
    mixed = len({is_aligned(each) for each in settings}) > 1
    for each in settings:
        words, teacher = [], each.get("enc_type", "none")
        if mixed and not is_aligned(each):
            words = ["no alignment"]
        elif mixed and "enc_type" not in names:
            words = ["alignment without a teacher" if teacher == "none" else phrase("enc_type", teacher)]
        words += [phrase(name, each.get(name)) for name in names if applies(name, each)]
        found.append(", ".join(words))
    return found


def sampling_words(made):
    """How samples were made, in words. `made`: their settings.json, with run and step of the checkpoint."""
    def is_number(name):
        return isinstance(made.get(name), (int, float))

    words = [str(made["run"])] if "run" in made else []
    words += [f"step {made['step']:,}"] if is_number("step") else []
    if "mode" in made:
        kind = "Heun" if made.get("heun") else MODES.get(str(made["mode"]), made["mode"])
        words.append(f"{made.get('num_steps', '')} {kind} steps".strip())
    if is_number("cfg_scale"):
        interval = [made.get("guidance_low", 0), made.get("guidance_high", 1)]
        part = "" if interval == [0, 1] else f" for t from {interval[0]} to {interval[1]}"
        words.append(f"guidance {made['cfg_scale']:g}{part}" if made["cfg_scale"] > 1 else "no guidance")
    words += [f"cache {made['cache']}"] if made.get("cache", "none") != "none" else []
    words += ["weights without averaging"] if made.get("weights") == "model" else []
    words += ["as many of each class"] if made.get("labels") == "balanced" else []
    words += [f"seed {made['global_seed']}"] if "global_seed" in made else []
    return ", ".join(words)


def groups(settings, names):
    """{label: indices of runs that differ in the seed alone}. Where no setting differs, the label is `names`."""
    alike = {}
    for place, label in enumerate(labels(settings, but=("seed",))):
        alike.setdefault(label, []).append(place)
    return {label or " and ".join(names[place] for place in places): places for label, places in alike.items()}


def mean_and_spread(values, sign=""):
    """'mean (lowest to highest)' with four digits."""
    if not values:
        return "-"
    largest = max(map(abs, values)) or 1
    digits = max(0, 3 - math.floor(math.log10(largest))) if math.isfinite(largest) else 0
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def markdown(header, rows):
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def latex(header, rows, words):
    """A table in LaTeX: the first `words` columns hold text, the others numbers. It needs the package booktabs."""
    def line(row):
        return " & ".join(map(escape, row)) + r" \\"

    return "\n".join([rf"\begin{{tabular}}{{{'l' * words}{'r' * (len(header) - words)}}}", r"\toprule", line(header),
                      r"\midrule", *map(line, rows), r"\bottomrule", r"\end{tabular}"])


def escape(text):
    """Text for LaTeX."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
               "\u2191": r"$\uparrow$", "\u2193": r"$\downarrow$", **{letter: f"\\{letter}" for letter in "&%$#_{}"}}
    return "".join(special.get(letter, letter) for letter in str(text))
