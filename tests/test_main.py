"""The command line: whole runs on the embedded data, and what is refused."""
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from tests.conftest import TINY


def test_trains_with_teacher_and_dgd_and_evaluates(tmp_path, teacher_path, capsys):
    out = tmp_path / 'out'
    assert main.main([*TINY, '--epochs', '3', '--teacher-path', str(teacher_path), '--distillation-type', 'hard', '--output_dir', str(out), '--finetune', str(teacher_path)]) == 0
    print(capsys.readouterr().out)
    assert 0
