"""Make any data set a reference: write the statistics of its features and, if asked, some of its images.

    python evaluations/stats.py SOURCE OUT.npz --images 10000

SOURCE is a folder of images or an npz. OUT.npz holds mu and sigma (for Inception also mu_s and sigma_s) of all its
images, n, features and preset. --images N adds a random choice of N images as arr_0, which precision, recall and KID
need. Runs on several processes under torchrun.
"""
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only
from evaluations.evaluator import add_network_arguments, extractor_from, given_paths
from runtime.errors import MAX_SEED, UserError, run_script
from runtime.flags import Parser, whole

logger = logging.getLogger(__name__)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help="npz or folder of images")
    parser.add_argument("out", metavar="OUT.npz", type=Path, help="the file to write")
    parser.add_argument("--images", type=whole(0), default=0, metavar="N", help="images to store; default 0")
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="of the choice of images; default 0")
    add_network_arguments(parser)
    args = parser.parse_args()
    import numpy as np

    from evaluations.extract import extract, join_processes, shard
    from evaluations.images import open_images
    from evaluations.scores import check_count
    from evaluations.statistics_file import write_statistics
    from runtime.files import prepare_output
    from runtime.setup import end_processes
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_output(args.out, (".npz",), given_paths(args, "out"))
    images = open_images(args.source)
    check_count(images.n, ("fid",), images.name)
    if args.images > images.n:
        raise UserError(f"--images {args.images}: {images.name} has only {images.n}; ask for fewer.")
    extractor = extractor_from(args, join_processes(args.device))
    start, stop = shard(images.n)
    found = extract(images.batches(start, stop, args.batch_size), stop - start, extractor, images.name, keep=False)
    if found:
        chosen = np.random.RandomState(args.seed).permutation(images.n)[:args.images]
        write_statistics(args.out, found, images, chosen, args.batch_size)
        logger.info("%s: statistics of %d images, %d of them stored", args.out, found.n, args.images)
    end_processes()


if __name__ == "__main__":
    run_script(main)
