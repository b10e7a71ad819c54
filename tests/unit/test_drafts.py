"""The drafter's part of an update, apart from vLLM: what is sent, what is refused, and what is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from engine_infos import engine_info
from safetensors.torch import save_file

from areal_vllm_ext.client.delivery import Delivery, Sharing
from areal_vllm_ext.client.drafts import DraftPart, say_kept
from areal_vllm_ext.client.options import Options
from areal_vllm_ext.client.weights import Checker
from areal_vllm_ext.engine_core.in_flight import UpdateInFlight
from areal_vllm_ext.engine_core.participant import Participant
from areal_vllm_ext.engine_core.queries import together
from areal_vllm_ext.engine_core.status import status_of
from areal_vllm_ext.errors import InvalidWeights
from areal_vllm_ext.integrity import digest
from areal_vllm_ext.integrity.verify import compare
from areal_vllm_ext.protocol import Begin, DraftWeights, TensorMeta, Units, WeightDigests, Weights
from areal_vllm_ext.protocol.types import WorkerWeights
from areal_vllm_ext.transport.buckets import total_bytes
from areal_vllm_ext.worker.drafts import StagedDraft
from areal_vllm_ext.worker.load import drafter
from areal_vllm_ext.worker.load.proof import readable
from areal_vllm_ext.worker.load.shadow import BuildOptions

if TYPE_CHECKING:
    from pathlib import Path

BASE = {"embed": torch.ones(4, 2), "norm": torch.ones(2)}
DRAFT = {"fc": torch.ones(2, 4), "layer": torch.zeros(2)}
STATUS = status_of(Participant(0, frozenset({0})), engine_info())


def metas(tensors: dict[str, torch.Tensor]) -> tuple[TensorMeta, ...]:
    return tuple(TensorMeta(name, "float32", tuple(tensor.shape)) for name, tensor in tensors.items())


def taken(*, with_base: bool = False) -> Weights:
    known = metas(BASE | DRAFT) if with_base else metas(BASE)
    optional = tuple(DRAFT) if with_base else ()
    return Weights(tensors=known, optional=optional, draft=DraftWeights(metas(DRAFT), with_base=with_base))


def test_what_comes_for_the_drafter_is_announced_so_that_engines_ask_for_its_room() -> None:
    def announced(given: object, takes: Weights) -> int:
        return DraftPart(None, given).fit(takes, "float32", "eagle")  # type: ignore[arg-type]

    own = total_bytes(metas(DRAFT))
    assert announced(DRAFT, taken()) == announced(DRAFT, taken(with_base=True)) == own
    assert announced(None, taken(with_base=True)) == own, "the base model's weights may hold it"
    assert announced(None, taken()) == announced(None, Weights(tensors=metas(BASE))) == 0
    context = SimpleNamespace(options=Options(), bucket_bytes=lambda *_: 1)
    targets = {"e": SimpleNamespace(engine=engine_info())}
    delivery = Delivery(context, targets, None, Sharing())  # type: ignore[arg-type]
    delivery.draft_bytes = own
    assert delivery.stagings()["e"].nbytes == own


def part(given: object, takes: Weights, method: str = "eagle") -> DraftPart:
    made = DraftPart(None, given)  # type: ignore[arg-type]
    made.fit(takes, "float32", method)
    return made


def test_a_drafter_for_engines_without_one_is_refused() -> None:
    with pytest.raises(InvalidWeights, match="and these do not: leave draft out, or start"):
        part(DRAFT, Weights(tensors=metas(BASE)), method="")
    with pytest.raises(InvalidWeights, match=r"\(eagle\): parallel drafting, .*pipeline stages.* leave draft out"):
        part(DRAFT, Weights(tensors=metas(BASE)))
    assert part(None, Weights(tensors=metas(BASE))).outcome == ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fc": torch.ones(2, 4)}, "draft: 1 of 2 tensors are missing: layer"),
        (DRAFT | {"fc": torch.ones(4, 4)}, "draft: fc has shape"),
        (DRAFT | {"more": torch.ones(1)}, "draft: more is not a weight"),
        (DRAFT | {"layer": torch.zeros(2, dtype=torch.int32)}, "draft: layer has dtype int32"),
    ],
    ids=["missing", "shape", "name", "dtype"],
)
def test_a_wrong_drafter_is_refused_before_any_engine_is_asked(wrong: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InvalidWeights, match=message):
        part(wrong, taken())


@pytest.mark.parametrize("form", ["dict", "iterator", "directory"])
def test_a_drafter_is_sent_in_each_form(form: str, tmp_path: Path) -> None:
    save_file(DRAFT, tmp_path / "model.safetensors")
    given = {"dict": DRAFT, "iterator": iter(DRAFT.items()), "directory": tmp_path}[form]
    made = part(given, taken())
    assert made.outcome == "kept"
    pairs = made.pairs()
    assert pairs is not None
    assert {meta.name for meta, _ in pairs} == set(DRAFT)
    assert made.outcome == "sent"


def walked(weights: object) -> DraftPart:
    """Send ``weights`` to engines whose drafter is in the base model's checkpoint."""
    made, takes = part(None, taken(with_base=True)), taken(with_base=True)
    checker = Checker(takes, "float32", None)
    made.watch(checker, weights)  # type: ignore[arg-type]
    sent = [meta.name for meta, _ in checker.check_source(weights)]  # type: ignore[arg-type]
    assert sorted(sent) == sorted(BASE)
    return made


@pytest.mark.parametrize("lasting", [True, False])
def test_layers_for_the_drafter_in_the_base_models_weights_move_it(lasting: bool) -> None:
    tensors = {name: tensor.clone() for name, tensor in (BASE | DRAFT).items()}
    made = walked(tensors if lasting else iter(tensors.items()))
    if not lasting:
        tensors["fc"].zero_()  # as a trainer that yields one buffer again and again
    pairs = dict(made.pairs() or ())
    assert {meta.name for meta in pairs} == set(DRAFT)
    assert torch.equal(next(tensor for meta, tensor in pairs.items() if meta.name == "fc"), DRAFT["fc"])


def test_without_them_it_is_kept_and_a_part_of_them_is_refused() -> None:
    kept = walked(BASE)
    assert kept.pairs() is None
    assert kept.outcome == "kept"
    with pytest.raises(InvalidWeights, match="draft: 1 of 2 tensors are missing: layer"):
        walked(BASE | {"fc": DRAFT["fc"]}).pairs()


def test_a_directory_tells_whether_it_holds_the_drafter(tmp_path: Path) -> None:
    for name, tensors, outcome in (("base", BASE, "kept"), ("both", BASE | DRAFT, "sent")):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        made = part(None, taken(with_base=True))
        made.look_into(str(tmp_path / name))
        assert made.outcome == outcome
    unseen = part(None, taken(with_base=True))
    unseen.look_into("/on/another/host")
    assert unseen.outcome == "sent", "the engines refuse it if it is incomplete"


def test_the_vote_is_over_the_drafter_too() -> None:
    assert digest.units_manifest("base", {}) == "base"
    votes = {
        digest.units_manifest("base", adapters, draft)
        for adapters in ({}, {"math": "m"})
        for draft in ("", "one", "other")
    }
    assert len(votes) == 6


def test_a_worker_without_a_drafter_says_no() -> None:
    staged = StagedDraft(None)
    with pytest.raises(ValueError, match="no drafter whose weights can be updated"):
        staged.add(DRAFT, {}, unchecked=False)
    with pytest.raises(ValueError, match="no drafter whose weights can be updated"):
        staged.vote(BuildOptions, wanted=True)
    assert staged.vote(BuildOptions, wanted=False) == ""
    assert not staged


def test_an_engine_has_a_drafter_only_if_each_worker_has(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "vllm.areal_vllm_ext"):
        assert together([taken(), taken()]).draft == taken().draft
        assert together([Weights(tensors=metas(BASE))]).draft is None
        assert not caplog.messages
        assert together([Weights(tensors=metas(BASE)), taken()]).draft is None
    assert "only 1 of 2 workers have it (pipeline stages)" in caplog.text


class Module(torch.nn.Module):
    def __init__(self, embed: torch.nn.Module) -> None:
        super().__init__()
        self.embed, self.fc = embed, torch.nn.Linear(2, 2)


def test_a_model_and_its_drafter_are_read_as_one() -> None:
    base = Module(torch.nn.Embedding(4, 2))
    model = Module(base.embed)
    assert list(drafter.shared_paths(model, base)) == ["embed"]
    both = drafter._Together(base, model)
    assert set(readable(both)) == {*readable(base), *(f"draft.{name}" for name in readable(model))}
    assert readable(both)["draft.embed.weight"] is base.embed.weight


def served(contents: dict[str, torch.Tensor]) -> WeightDigests:
    values = digest.digests_of(contents.values())
    worker = WorkerWeights(0, "rank 0", "", {}, contents=tuple(zip(metas(contents), values, strict=True)))
    return WeightDigests(workers=(worker,))


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("stale", [True, False])
def test_verify_compares_the_drafter_with_its_checkpoint(with_base: bool, stale: bool) -> None:
    drafted = {f"draft.{name}": tensor + stale for name, tensor in DRAFT.items()}
    answer, status = served(BASE | drafted), STATUS
    files = BASE | DRAFT if with_base else BASE
    checkpoint = {
        meta.name: (meta, value) for meta, value in zip(metas(files), digest.digests_of(files.values()), strict=True)
    }
    draft = dict(zip(DRAFT, zip(metas(DRAFT), digest.digests_of(DRAFT.values()), strict=True), strict=True))
    given = None if with_base else draft
    found = compare({"e": answer}, {"e": status}, checkpoint, taken(with_base=with_base), given)
    assert {one.tensor for one in found.differences} == (set(drafted) if stale else set())
    assert compare({"e": answer}, {"e": status}, checkpoint, taken(with_base=with_base)).equal == (
        not (with_base and stale)
    )


def test_a_drafter_that_no_update_moved_is_not_what_its_checkpoint_says() -> None:
    draft = dict(zip(DRAFT, zip(metas(DRAFT), digest.digests_of(DRAFT.values()), strict=True), strict=True))
    base = dict(zip(BASE, zip(metas(BASE), digest.digests_of(BASE.values()), strict=True), strict=True))
    found = compare({"e": served(BASE)}, {"e": STATUS}, base, taken(), draft)
    assert [one.reason for one in found.differences] == ["is in the checkpoint but was never applied"] * len(DRAFT)


def test_an_engine_knows_which_version_its_drafter_has() -> None:
    participant, versions = Participant(0, frozenset({0})), []
    for version, units in ((1, Units()), (2, Units(draft=True)), (3, Units())):
        begin = Begin(epoch=version, update=str(version), version=version, senders={}, timeout=9.0)
        participant.update, participant.update_phase = UpdateInFlight(begin, 9.0, frozenset({0})), "committing"
        participant.update.units = units
        participant.commit_done("", 0.0)
        versions.append(status_of(participant, engine_info()).draft_version)
    assert versions == [None, 2, 2]


def test_the_log_names_each_version_that_drafters_keep(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "vllm.areal_vllm_ext"):
        say_kept("eagle", {3})
        say_kept("eagle", {None, 3})
    assert "(eagle) that this update does not bring: it keeps version 3, so" in caplog.messages[0]
    assert "keeps the weights that it was started with or, on other engines, version 3, so" in caplog.messages[1]
