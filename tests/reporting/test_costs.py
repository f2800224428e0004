"""What the table of costs says of runs that several machines have trained."""

from pathlib import Path

import pytest
from fake_runs import write_run

from mambaseg.reporting.costs import conditions, costs_of
from mambaseg.reporting.reading import read_run
from mambaseg.reporting.runs import RunData

A100, V100 = ({"cpu": "a CPU", "gpus": [name]} for name in ("A100", "V100"))
CPU = {"cpu": "a CPU", "gpus": []}


@pytest.mark.parametrize(
    ("resumed", "said"),
    [
        ([], "V100"),
        ([{"step": 5, "devices": 2}], "V100, 2 devices"),  # as earlier versions recorded it
        ([{"hardware": V100}], "V100"),
        ([{"hardware": A100}], "A100 (before a pause V100)"),
        ([{"hardware": A100}, {"hardware": CPU, "threads": 2}],
         "a CPU (before a pause V100, A100), 2 threads"),
        ([{"hardware": A100}, {"hardware": V100}], "V100 (before a pause A100)"),
    ],
)  # fmt: skip
def test_times_are_those_of_the_machine_that_ended_the_run(tmp_path, resumed, said):
    record = {"hardware": V100, "threads": 1, "resumed": resumed}
    run = read_run(write_run(tmp_path, patients=(1,), size=16, record=record))
    assert conditions(run).partition(", precision")[0] == said


def test_passes_and_operations_are_of_the_same_run():
    costs = [{"macs": None, "passes": 7.0}, {"macs": 2e9, "scan_flops": 1e9, "passes": 4.0},
             {"macs": None, "passes": 9.0}]  # fmt: skip
    runs = [RunData(Path(), {"cost": cost}, {}, {}, ()) for cost in costs]
    found = costs_of(runs)
    assert (found.macs, found.scan_flops, found.passes) == (2e9, 1e9, 4.0)
