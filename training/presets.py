"""Runs by name, `train.py --preset sit-b-2-haste`: those of the paper's tables and the quickstart. Typed flags win.

A preset lists what differs from the defaults, the paper's run. What depends on the model (encoder depth, aligned
blocks, early-stop point) is in the table of models/sit.py or models/mmdit.py.
"""
import sys
import textwrap

from runtime.errors import UserError
from runtime.flags import Parser

NEVER = 10 ** 9  # REPA aligns from the first step to the last
REPA = {"attn_coeff": 0.0, "early_stop_point": NEVER}
E2E_VAE = "REPA-E/e2e-vavae-hf"
IREPA = {"projector": "conv", "spatial_norm": 0.6, "proj_coeff": 1.0, **REPA}
EMBEDDED = {
    "resolution": 64, "vae": "assets/vae-emoji", "enc_type": "dinov2-vit-s", "enc_blocks": 10,
    "enc_weights": "data/emoji/teacher.safetensors",
    "early_stop_point": 600, "max_train_steps": 1200, "checkpointing_steps": 600, "sampling_steps": 300,
    "log_every": 30, "batch_size": 32, "learning_rate": 1e-3, "ema_decay": 0.995, "num_workers": 0, "report_to": "none"}

# name -> script, arguments, what arXiv 2505.16792 reports of the run
PRESETS = {
    "sit-xl-2-haste": ("train.py", {"model": "SiT-XL/2", "max_train_steps": 500_000},
                       ("FID 15.9 at 100K steps, 9.9 at 200K, 8.4 at 250K, 7.3 at 400K, 5.3 at 500K; guided: 1.74 at "
                       "500K (--cfg-scale 1.825 --guidance-high 0.6), 1.42 at 2.5M (--cfg-scale 1.65 --guidance-high "
                       "0.72)")),
    "sit-xl-2-repa": ("train.py", {"model": "SiT-XL/2", **REPA}, "FID 7.9 at 400K steps"),
    "sit-xl-2-irepa": ("train.py", {"model": "SiT-XL/2", **IREPA},
                       "arXiv 2512.10794: FID 16.96 at 100K steps, 19.06 with REPA"),
    "sit-xl-2-vanilla": ("train.py", {"model": "SiT-XL/2", "enc_type": "none"}, "FID 17.2 at 400K steps"),
    "sit-xl-2-haste-512": ("train.py", {"model": "SiT-XL/2", "resolution": 512, "encode_online": True},
                           ("512 px, images/ alone is read; the teacher sees 448 px, alignment ends at step 300,000, "
                            "as the paper has it")),
    "sit-l-2-haste": ("train.py", {"model": "SiT-L/2"}, "FID 19.6 at 100K steps, 12.1 at 200K, 8.9 at 400K"),
    "sit-l-2-repa": ("train.py", {"model": "SiT-L/2", **REPA}, "FID 10.0 at 400K steps"),
    "sit-l-2-vanilla": ("train.py", {"model": "SiT-L/2", "enc_type": "none"}, "FID 18.8 at 400K steps"),
    "sit-b-2-haste": ("train.py", {"model": "SiT-B/2"}, "FID 39.9 at 100K steps, 25.7 at 200K, 19.6 at 400K"),
    "sit-b-2-haste-trigger": ("train.py", {"model": "SiT-B/2", "early_stop_trigger": "gradient"},
                              ("mean cosine 0.0030 at 50K steps, 0.0041 at 60K, 0.0225 at 70K, -0.0668 at 80K: "
                              "alignment ends")),
    "sit-b-2-haste-clip": ("train.py", {"model": "SiT-B/2", "enc_type": "clip-vit-B", "enc_size": 224},
                           "FID 48.74 at 100K steps, 54.92 with REPA"),
    "sit-b-2-repa": ("train.py", {"model": "SiT-B/2", **REPA}, "FID 24.4 at 400K steps"),
    "sit-b-2-irepa": ("train.py", {"model": "SiT-B/2", "enc_type": "dinov3-vit-b16", "encoder_depth": 4, **IREPA},
                      "arXiv 2512.10794: FID 19.7 at 400K steps, 23.9 with REPA"),
    "sit-b-2-vanilla": ("train.py", {"model": "SiT-B/2", "enc_type": "none"}, "FID 33.0 at 400K steps"),
    **{f"sit-xl-1-{name}": ("train.py", {"model": "SiT-XL/1", "vae": E2E_VAE, **more},
                            ("not from the paper: on the latents of a VAE tuned end to end (arXiv 2504.10483), 32 "
                             "channels at a 16th of the side; `dataset_tools.py stats` makes their mean and std"))
       for name, more in (("haste", {}), ("repa", REPA), ("vanilla", {"enc_type": "none"}))},
    "mmdit-haste": ("train_t2i.py", {"model": "MMDiT", "early_stop_point": 200_000, "max_train_steps": 250_000},
                    "FID on COCO 4.06 at 250K steps, of 40,192 images with --cfg-scale 2.25"),
    "embedded": ("train.py", {"model": "SiT-T/2", "num_classes": 9, "data_dir": "data/emoji/train",
                              "teacher_cache": "data/emoji/teacher-cache", **EMBEDDED},
                 "not from the paper: the run of `make quickstart`, whose data this repository makes"),
    "embedded-t2i": ("train_t2i.py", {"model": "MMDiT-T", "data_dir": "data/emoji-captions",
                                      "teacher_cache": "data/emoji-captions/teacher-cache", **EMBEDDED},
                     "not from the paper: the run of `make quickstart-t2i`"),
}
PRESETS["cifar10"] = ("train.py", {
    "model": "SiT-XS/2", "vae": "assets/vae-cifar10", "resolution": 32, "num_classes": 10,
    "data_dir": "data/cifar10/train", "enc_type": "dinov2-vit-s", "enc_weights": "data/cifar10/teacher.safetensors",
    "enc_blocks": 9, "enc_size": 56, "resample": "teacher", "early_stop_point": 400, "max_train_steps": 2000,
    "checkpointing_steps": 1000, "sampling_steps": 1000, "log_every": 50, "batch_size": 64, "learning_rate": 2e-3,
    "ema_decay": 0.995, "num_workers": 0, "report_to": "none"},
    "not from the paper: the run of `make quickstart-cifar10`")
HEADING = ("Typed flags win over a preset's. The numbers are the paper's, not ours: FID by ADM's evaluation of 50,000 "
           "samples of an SDE in 250 steps, without guidance where not said otherwise.")


def listing():
    """The table as text: name, command line, reported numbers."""
    lines = [textwrap.fill(HEADING, 110)]
    for name, (script, arguments, reported) in PRESETS.items():
        flags = " ".join(f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}")
                         for key, value in arguments.items())
        paragraphs = (textwrap.fill(text, 110, initial_indent="    ", subsequent_indent="        ",
                                    break_on_hyphens=False) for text in (f"{script} {flags}", reported))
        lines += ["", name, *paragraphs]
    return "\n".join(lines)


def parse_with_preset(parser, script):
    """`script`'s arguments, with those of --preset as defaults; `--preset list` prints and exits.

    Raises UserError for a name that is not known or that is another script's.
    """
    finder = Parser(config=False, add_help=False)
    for p in (parser, finder):
        p.add_argument("--preset", metavar="NAME", help="settings of a run of the paper or a quickstart, which typed "
                       "flags and --config change; `list` shows them with the numbers that the paper reports: "
                       + ", ".join(name for name, row in PRESETS.items() if row[0] == script))
    name = finder.parse_known_args()[0].preset or parser.from_file(sys.argv[1:]).get("preset")
    if name == "list":
        print(listing())
        sys.exit()
    if name is not None:
        if name not in PRESETS:
            raise UserError(f"--preset {name} is not known; `--preset list` shows all of them.")
        owner, arguments, _ = PRESETS[name]
        if owner != script:
            raise UserError(f"--preset {name} is a run of {owner}; give it there, or choose another from `--preset "
                            "list`.")
        parser.set_defaults(**arguments)
    return parser.parse_args()
