"""The paper's table and the speed limit, in slices of minutes: the same command goes on by itself.

python src/gpu_table.py data/acdc_pack outputs/gpu_table --minutes 9 --results results
"""

import argparse
import logging
import shutil
import sys
from pathlib import Path

from mambaseg.benchmark.gpu_page import write_page
from mambaseg.benchmark.gpu_parts import NETWORKS, gpu_parts
from mambaseg.benchmark.plan import Plan, pack_results, unpack_results
from mambaseg.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger(__name__)


def main(words: list[str]) -> int:
    """One slice: exit code 0, done or not; 1 where a part has failed."""
    options = _options(words)
    out: Path = options.out.resolve()
    if options.results and not (out / "plan.json").exists():
        unpack_results(options.results, out)
    out.mkdir(parents=True, exist_ok=True)
    parts = gpu_parts(
        options.data.resolve(), out, networks=options.networks, seeds=options.seeds,
        train=options.train, bench=options.bench, only=options.only,
    )  # fmt: skip
    plan = Plan(parts, out, cwd=ROOT)
    plan.run(60 * options.minutes)
    page = write_page(plan, out)
    log.info("table: %s", page)
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        for archive in pack_results(out, options.results.resolve()):
            log.info("results: %s (%.1f MiB)", archive, archive.stat().st_size / 2**20)
        shutil.copy(page, options.results)
    left = plan.left()
    failed = [part.name for part in left if plan.state(part)["status"] == "failed"]
    if failed:
        log.warning("failed: %s (logs in %s); the same command tries again", ", ".join(failed), out)
    if left:
        names = ", ".join(part.name for part in left)
        done = len(parts) - len(left)
        log.info("%d of %d parts are done, left: %s", done, len(parts), names)
        log.info("the same command goes on")
    else:
        log.info("all %d parts are done", len(parts))
    return int(bool(failed))


def _options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_table.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, help="ACDC in any layout, e.g. a pack")
    parser.add_argument("out", type=Path, help="folder for runs, logs, results; stays on the disk")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of a slice (9)")
    parser.add_argument("--results", type=Path, help="also put results-*.zip and table.md here; "
                        "what is found here is unpacked where OUT is new")  # fmt: skip
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), help="leaves of conf/model"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337], help="(1337)")
    parser.add_argument("--only", nargs="+", help="parts by the beginning of their names")
    parser.add_argument("--train", nargs="+", default=[], help="words for every train.py")
    parser.add_argument("--bench", nargs="+", default=[], help="words for every benchmark.py")
    return parser.parse_args(words)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(str(error))
