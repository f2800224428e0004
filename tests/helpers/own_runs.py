"""Small trainings with a folder of configs beside ours: use `runs` instead."""

import runs


def composed(name, folder, *overrides):
    return runs.composed(*overrides, script=name, configs=folder)


def trained(folder, tmp_path, *overrides):
    return runs.trained(*runs.own_overrides(tmp_path), *overrides, configs=folder)
