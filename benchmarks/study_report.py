"""Results of study.py as text and picture. A result is {"scores": {score: {step: value}}, ...}, `found`
is {variant: {seed: result}}."""
import statistics

from benchmarks.measure import table
from evaluations import score_names
from evaluations.tables import mean_and_spread
from runtime.files import atomic_write

FEATURES, METRICS = "efficientnet-lite0", ("fid", "kid", "pr")
LOSS = "held-out loss"
SCORES = (*score_names(FEATURES, METRICS), LOSS)
COMPARED = (*score_names(FEATURES, ("fid", "kid")), LOSS)  # lower is better
NO_STOP = "HASTE, no stop"


def curve(result, score):
    """{step: value}."""
    return {int(step): value for step, value in result["scores"].get(score, {}).items()}


def at(results, score, step):
    """Values of the seeds, {seed: value}."""
    return {seed: curve(result, score)[step] for seed, result in results.items() if step in curve(result, score)}


def difference(found, name, base, score, step):
    """[value of `name` - value of `base`] at `step`, for each seed that both have."""
    one, other = (at(found.get(who, {}), score, step) for who in (name, base))
    return [one[seed] - other[seed] for seed in one if seed in other]


def steps_to_reach(points, target):
    """The first step at which the line through `points` {step: value} is at or below `target`, or None."""
    before = None
    for step, value in sorted(points.items()):
        if value <= target:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - value)
        before = step, value
    return None


def share_of_steps(found, name, score, steps):
    """Text: the share of vanilla's steps that `name` needs for vanilla's final score, over the seeds that both have."""
    shares = []
    for seed, result in found.get("vanilla", {}).items():
        if seed in found[name]:
            reached = steps_to_reach(curve(found[name][seed], score), curve(result, score)[steps])
            shares.append(reached and reached / steps)
    if None in shares:
        return f"not reached by {shares.count(None)} of {len(shares)}"
    return mean_and_spread(shares)


def differences(found, names, base, steps):
    """Table: a row for each of `names`, a column for each score and step."""
    header = ["variant", *(f"{score} at {step}" for score in COMPARED for step in steps)]
    return table(header, [[name, *(mean_and_spread(difference(found, name, base, score, step), sign="+")
                                   for score in COMPARED for step in steps)] for name in names])


def as_text(found, steps, protocol, left_out):
    """Markdown: `protocol`, then the scores after `steps` steps and the differences. `left_out`: missing runs."""
    others = [name for name in found if name != "vanilla"]
    results = [result for by_seed in found.values() for result in by_seed.values()]
    fired = [f"{result['trigger fired'] or 'never'} (seed {seed})" for seed, result
             in found.get("HASTE, gradient trigger", {}).items()]
    return "\n\n".join(filter(None, [
        f"{protocol} Machines: {'; '.join(sorted({result['machine'].split('; ', 1)[1] for result in results}))}.",
        table(["variant", *(f"{score} at {steps}" for score in SCORES), "seeds", "minutes of training"],
              [[name, *(mean_and_spread(list(at(by_seed, score, steps).values())) for score in SCORES),
                " ".join(map(str, by_seed)),
                f"{statistics.mean(result['seconds of training'] for result in by_seed.values()) / 60:.0f}"]
               for name, by_seed in found.items()]),
        "Difference to vanilla of the same seed, at half of the run and at its end; below 0 is better than vanilla:",
        differences(found, others, "vanilla", [steps // 2, steps]),
        "Difference to HASTE without a stop of the same seed, at the end; below 0 is better:",
        differences(found, [name for name in others if name != NO_STOP], NO_STOP, [steps]),
        "Part of vanilla's steps after which vanilla's final score is reached (linear between scores):",
        table(["variant", *COMPARED], [[name, *(share_of_steps(found, name, score, steps) for score in COMPARED)]
                                       for name in others]),
        f"The gradient trigger fired after step {', '.join(fired)}." if fired else "",
        f"Not run yet: {', '.join(left_out)}." if left_out else ""])) + "\n"


def draw(path, found):
    """Each score along the steps, a line a variant, the seeds' range as a band."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, len(COMPARED))
    for i, (name, results) in enumerate(found.items()):
        is_stopped = "stop at" in name or "trigger" in name
        style = {"color": f"C{i}", "linestyle": "--" if is_stopped else "-"}
        for axis, score in zip(axes, COMPARED, strict=True):
            steps = sorted(set.intersection(*(set(curve(result, score)) for result in results.values())))
            low, mean, high = ([f(at(results, score, step).values()) for step in steps]
                               for f in (min, statistics.mean, max))
            axis.plot(steps, mean, marker="o", markersize=3, label=f"{name} ({len(results)})", **style)
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.12)
            axis.set(title=score, xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, title="variant (seeds)")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
