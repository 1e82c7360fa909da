"""Heads are written whole or not at all, and their draft vocabulary is read as it is meant or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from atlas_rl.speculators.head_checkpoint import draft_vocabulary, write_head


def test_a_failed_write_leaves_the_head_that_was_there(tmp_path):
    write_head(tmp_path, {"size": 1}, {"weight": torch.zeros(2)})
    (tmp_path / "model.safetensors.partial").mkdir()
    with pytest.raises(OSError, match=r"model.safetensors' cannot be written"):
        write_head(tmp_path, {"size": 2}, {"weight": torch.ones(2)})
    (tmp_path / "model.safetensors.partial").rmdir()
    assert not load_file(tmp_path / "model.safetensors")["weight"].any()
    (tmp_path / "config.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_head(tmp_path, {"size": 2}, {"weight": torch.ones(2)})
    assert json.loads((tmp_path / "config.json").read_text()) == {"size": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_sparse_offsets_are_taken_where_t2d_says_so():
    ids = torch.tensor([5, 9, 20])
    d2t, t2d = ids - torch.arange(3), torch.zeros(100, dtype=torch.bool)
    t2d[ids] = True
    assert torch.equal(draft_vocabulary({"d2t": d2t, "t2d": t2d}, 3, 100, "the head")["d2t"], d2t)
    with pytest.raises(ValueError, match=r"the head: d2t can be read as offsets and as token ids. Add t2d"):
        draft_vocabulary({"d2t": d2t}, 3, 100, "the head")
