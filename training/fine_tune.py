"""Start a run from the weights of another (--init-from), and leave a part of them as they are (--freeze)."""
import fnmatch
import logging
import re

from data_io.latent_scale import scale_of
from models.checkpoint import load_checkpoint, load_weights, modern_names
from runtime.errors import UserError

# Parts whose shape depends on the data set or the teacher: in words -> pattern of how their weights' names begin.
MADE_ANEW = {"the label table": r"y_embedder\.embedding_table\.weight", "the position table": r"pos_embed",
             "a projector": r"projectors\.\d+\."}

logger = logging.getLogger("haste")


def init_from(model, args):
    """Load the weights of args.init_from, a file that load_checkpoint takes, into `model`; does nothing without one.

    Parts in MADE_ANEW whose shape differs keep their init, which is logged. Raises UserError for any other difference.
    """
    if not args.init_from:
        return
    path, source = args.init_from, args.init_weights
    state = load_checkpoint(path, needed=(source,))
    ours, theirs = model.state_dict(), modern_names(state[source])
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (theirs, ours)]
    differing = sorted(name for name in {*ours, *theirs} if shapes[0].get(name) != shapes[1].get(name))
    anew = {found[0]: (words, name) for name in reversed(differing) for words, pattern in MADE_ANEW.items()
            if (found := re.match(pattern, name))}
    for begin, (words, name) in sorted(anew.items()):
        if begin.startswith("y_embedder") and begin in frozen_parameters(model, args.freeze):
            raise UserError(f"--freeze names {words}, which is initialised anew, as {path} has other classes; it would "
                            "stay random. Leave that pattern out.")
        logger.info(f"--init-from: {words} is initialised anew, {name} being {shapes[0].get(name, 'missing')} in "
                    f"{path} and {shapes[1].get(name, 'missing')} here")
        theirs = {name: value for name, value in theirs.items() if not name.startswith(begin)}
        theirs |= {name: value for name, value in ours.items() if name.startswith(begin)}
    load_weights(model, theirs, path)
    saved = state["args"]
    for name, there, here in (("latents", scale_of(saved), scale_of(vars(args))),
                              ("--path-type", saved.get("path_type") or args.path_type, args.path_type)):
        if there != here:
            logger.warning(f"--init-from: {path} was trained with other {name} ({there}, here {here}).")
    logger.info(f"initialised from the weights ({source}) of {path}"
                + (f", after {state['steps']} steps" if state.get("steps") else ""))


def frozen_parameters(model, patterns):
    """{name: parameter} that --freeze names: patterns of a parameter, or of a module with all that is in it."""
    return {name: parameter for name, parameter in model.named_parameters()
            if any(fnmatch.fnmatchcase(name, wanted) for pattern in patterns or ()
                   for wanted in (pattern, f"{pattern}.*"))}


def set_trainable(model, frozen, aligned):
    """Set requires_grad: True for the projectors only while `aligned`, False for what the patterns `frozen` name."""
    model.projectors.requires_grad_(aligned)
    for parameter in frozen_parameters(model, frozen).values():
        parameter.requires_grad_(False)


def check_frozen(model, args):
    """Raise UserError for a pattern of args.freeze that names nothing, or where nothing is left to train."""
    for pattern in args.freeze or ():
        if not frozen_parameters(model, [pattern]):
            parts = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"--freeze {pattern} names no weight of {args.model}; its parts are {parts}, and a pattern "
                            'such as "blocks.[0-3]" names some of them.')
    frozen = frozen_parameters(model, args.freeze)
    block = f"blocks.{args.trigger_block - 1}." if args.early_stop_trigger == "gradient" else None
    if block and any(block in name for name in frozen):
        raise UserError(f"--freeze names weights of block {args.trigger_block}, whose gradients --early-stop-trigger "
                        "gradient compares; choose another --trigger-block, or train that block.")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and name not in frozen}
    if all(name.startswith("projectors.") for name in trained):
        raise UserError("--freeze leaves nothing to train; leave some of its patterns out.")
    if frozen:
        logger.info(f"--freeze: {sum(trained.values()):,} parameters are trained, "
                    f"{sum(p.numel() for p in frozen.values()):,} stay as they are")
