"""Trainings in processes of their own, which get signals at moments that are said beforehand.

A fresh process imports everything once and forks for each attempt, so that an attempt costs a
second or two rather than the imports. The attempt tells through a pipe what it is about to do:
`step 7 <batch>`, `save 8`, `name <file> <name>`, `val 8 <case>`, `write <file>`, `test 8 <case>`.
"""

import collections
import gc
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
# what every attempt would import itself, in more time than it takes
IMPORTED = (
    "runs", "mambaseg.training.run", "mambaseg.training.loggers", "mambaseg.data.datamodule",
    "mambaseg.evaluation.nearest", "matplotlib.figure",
)  # fmt: skip


def run_forked(experiments, *, timeout=900):
    """Runs experiments one after the other in a fresh process.

    Args:
        experiments: name -> `words` of a training, `env` (may be absent), and one of `kills` (how
            many SIGKILLs, spread over its events by `seed`) or `signals` (list of [begin of an
            event, name of one]); with neither it is undisturbed, and the others have its events.
        timeout: s for all of them.

    Returns:
        name -> list of attempts: `event`, `code` (negative: the signal), and of run.json after it
        `status`, `error` and `step`, that the attempt went on from.
    """
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(experiments)],
        capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- in the fresh process ------------------------------------------------------------------------


def tell(pipe, answers):
    """Lets this process say what it is about to do, and go on when that was heard.

    Else a training of milliseconds would be over on a busy machine before its signal is sent.
    """
    from mambaseg.storage.run_folder import RunFolder
    from mambaseg.training import checkpoints
    from mambaseg.training.segmentation import SegmentationTask

    def before(owner, name, say):
        whole = getattr(owner, name)

        def told(*args, **kwargs):
            os.write(pipe, (say(*args) + "\n").encode())
            os.read(answers, 1)
            return whole(*args, **kwargs)

        setattr(owner, name, told)

    def scored(stage):
        return lambda task, batch, index: f"{stage} {task.global_step} {batch['case'].id}"

    before(SegmentationTask, "training_step", lambda task, batch, i: f"step {batch['step']} {i}")
    before(SegmentationTask, "validation_step", scored("val"))
    before(SegmentationTask, "test_step", scored("test"))
    before(checkpoints.torch, "save", lambda content, _: f"save {content['global_step']}")
    before(checkpoints, "give_name", lambda path, name: f"name {path.stem} {name.stem}")
    before(RunFolder, "write_rows", lambda folder, name, rows: f"write {name}")
    before(RunFolder, "write_arrays", lambda folder, name, arrays: f"write {name}")


def train(words):
    """Does what src/train.py does."""
    from runs import built

    with built(*words) as run:
        if not run.finished:
            run.fit()
            run.evaluate()


def attempt(experiment, log, due, wait, number):
    """One training in a forked process, until it ends by itself or by a signal.

    Args:
        experiment: with its `words` and `env`.
        log: file for what it prints.
        due: events of which the first is the moment of the signal.
        wait: s after that event, of SIGKILL; other signals are there before the process goes on.
        number: of the signal.

    Returns:
        Its exit code, the event, and all events with the seconds that each took.
    """
    reading, writing = os.pipe()
    answers, heard = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        os.close(heard)
        be_the_training(experiment, log, writing, answers)
    os.close(writing)
    os.close(answers)
    events, hit, before = [], None, time.monotonic()
    with os.fdopen(reading) as pipe:
        for event in map(str.strip, pipe):
            now = time.monotonic()
            if events:
                events[-1][1] = now - before
            events.append([event, 0.0])
            before = now
            is_due = hit is None and event in due
            hit = event if is_due else hit
            if is_due and number != signal.SIGKILL:
                os.killpg(pid, number)  # as a terminal or a cluster: to the loader workers too
            os.write(heard, b".")
            if is_due and number == signal.SIGKILL:
                time.sleep(wait)
                os.kill(pid, number)
                break  # its workers may live on for a while and hold the pipe
    os.close(heard)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), hit, events


def be_the_training(experiment, log, pipe, answers):
    """Does not return."""
    code = 99
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(experiment.get("env", {}))
        # a shell has its background jobs ignore SIGINT, nohup SIGHUP, and so would what they start
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        tell(pipe, answers)
        train(experiment["words"])
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def moments(experiment, events):
    """When which signal is due: (place among the events, s after it, number)."""
    for begin, name in experiment.get("signals", []):
        place = next(place for place, (event, _) in enumerate(events) if event.startswith(begin))
        yield place, 0.0, signal.Signals[name].value
    hit = collections.Counter()  # of each part of a stretch, what was hit least is taken
    draw, kills = random.Random(experiment.get("seed")), experiment.get("kills", 0)
    for kill in range(kills):
        places = range(len(events) * kill // kills, len(events) * (kill + 1) // kills)
        kinds = {place: events[place][0].split()[0] for place in places}
        place = min(places, key=lambda place: (hit[kinds[place]], draw.random()))
        hit[kinds[place]] += 1
        yield place, draw.random() * events[place][1], signal.SIGKILL.value


def main():
    import torch

    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()
    torch.set_num_threads(1)
    report, undisturbed = {}, []
    for name, experiment in json.loads(sys.argv[1]).items():
        outputs = next(word[8:] for word in experiment["words"] if word.startswith("outputs="))
        outputs = Path(outputs)
        outputs.mkdir(parents=True, exist_ok=True)
        orders = list(moments(experiment, undisturbed))
        report[name] = []
        for place, wait, number in [*orders, (len(undisturbed), 0.0, None)]:
            names = [event for event, _ in undisturbed]
            due = {*names[place:]} - {*names[:place]}
            code, hit, events = attempt(experiment, outputs / "printed.txt", due, wait, number)
            found = outputs.glob("*/*/run.json")
            (path,) = (path for path in found if path.parent.suffix != ".previous")
            record = json.loads(path.read_text())
            last = {key: record.get(key) for key in ("status", "error")}
            last["step"] = record.get("resumed", [{}])[-1].get("step", 0)
            report[name].append({"event": hit, "code": code, **last})
        if not orders:
            undisturbed = events
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
