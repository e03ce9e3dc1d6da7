"""What ranks tell each other, on two real gloo processes."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.data.ranks import check_agreement, gathered
from tests import tiny


def test_one_rank_asks_nobody():
    assert gathered("a", 1) == ["a"]
    check_agreement(None, (None,), 1)
    with pytest.raises(ValueError, match="mine"):
        check_agreement(ValueError("mine"), (None,), 1)


def on_rank(rank: int, folder: Path, answers) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = [gathered(rank, 2)]
    tokenizer = tiny.load_tiny_tokenizer()
    corpora = []
    for number in (0, rank):
        config = tiny.tiny_data_config(folder / f"data{number}" / "meta.json")
        data = DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
        data.setup("fit")
        corpora.append(data.train_corpus)
    cases = ((None, corpora[0]), (ValueError("disk full") if rank else None, None), (None, corpora[1]))
    for problem, corpus in cases:
        try:
            check_agreement(problem, (corpus, None), 2)
            found.append("agreed")
        except ValueError as error:
            found.append(str(error))
    answers.put((rank, found))
    torch.distributed.destroy_process_group()


def test_all_ranks_stop_where_one_has_to(tmp_path):
    """Equal rows agree; one rank's fault is everyone's; other rows on one rank are named on both."""
    tiny.write_tiny_data(tmp_path / "data0")
    tiny.write_tiny_data(tmp_path / "data1", rows=11)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=on_rank, args=(rank, tmp_path, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    for rank in range(2):
        assert found[rank][:2] == [[0, 1], "agreed"]
    assert found[0][2] == "rank 1 cannot go on: disk full"
    assert found[1][2] == "disk full"
    for rank in range(2):
        assert "the ranks see different rows" in found[rank][3]
        assert "('text', 12, " in found[rank][3]
        assert "('text', 11, " in found[rank][3]
