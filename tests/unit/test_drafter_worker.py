"""A worker's drafter, with real models of vLLM: what an update stages, builds and makes live, and what a peer hands over."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_kernel_format import FETCH, Worker, fetch
from vllm_models import LoadedWorker, checkpoint, saved, trained, weights_of

from areal_vllm_ext.integrity import digest
from areal_vllm_ext.protocol import Begin, Staging
from areal_vllm_ext.protocol.peer_messages import EndOffer
from areal_vllm_ext.transport.buckets import contents_of, total_bytes
from areal_vllm_ext.worker.drafts import Drafter, StagedDraft
from areal_vllm_ext.worker.load import proof
from areal_vllm_ext.worker.load.drafter import DrafterWorker, shared_paths
from areal_vllm_ext.worker.load.shadow import BuildOptions
from areal_vllm_ext.worker.staged_update import StagedUpdate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


pytestmark = pytest.mark.timeout(300)


class DraftingWorker(LoadedWorker):
    """A worker with a draft model that vLLM's own proposer has loaded."""

    def __init__(self, folder: Path, drafter: Path) -> None:
        speculative = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": 2}
        super().__init__(folder, speculative_config=speculative)
        self.start_drafter()

    def start_drafter(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.v1.spec_decode.draft_model import DraftModelProposer

        proposer: Any = DraftModelProposer.__new__(DraftModelProposer)
        proposer.vllm_config = self.vllm_config
        proposer.speculative_config = self.vllm_config.speculative_config
        with set_current_vllm_config(self.vllm_config):
            self.drafter = proposer.model = proposer._get_model()
        self.model_runner = SimpleNamespace(drafter=proposer)

    def get_draft_model(self) -> torch.nn.Module:
        return self.drafter

    def drafts_with(self) -> dict[str, int]:
        """What the drafter computes with."""
        model = self.get_draft_model()
        return proof.digests_of_model(model) | proof.packed_digests(model)


class SpeculatingWorker(DraftingWorker):
    """Its draft model was loaded by the speculator of vLLM's model runner V2, which GPUs have by default."""

    def start_drafter(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

        speculator: Any = StandaloneARSpeculator.__new__(StandaloneARSpeculator)
        speculator.vllm_config = self.vllm_config
        speculator.speculative_config = self.vllm_config.speculative_config
        speculator.draft_model_config = speculator.speculative_config.draft_model_config
        with set_current_vllm_config(self.vllm_config):
            self.drafter = speculator.model = speculator.load_draft_model(self.get_model(), set())
        self.model_runner = SimpleNamespace(speculator=speculator)


@pytest.fixture(scope="module")
def folders() -> Iterator[list[Path]]:
    """Checkpoints of one model with three sets of weights."""
    folder = checkpoint("dense")
    with saved(trained(weights_of(folder), 1), folder) as one, saved(trained(weights_of(folder), 2), folder) as two:
        yield [folder, one, two]


def staged(drafter: Drafter, tensors: dict[str, torch.Tensor]) -> StagedDraft:
    update = StagedDraft(drafter)
    update.add(tensors, contents_of(tensors), unchecked=True)
    return update


@pytest.mark.parametrize("kind", [DraftingWorker, SpeculatingWorker])
def test_new_weights_are_built_beside_the_drafter_then_copied_by_a_plan(
    folders: list[Path], kind: type[DraftingWorker]
) -> None:
    base, *others = folders
    worker = kind(base, others[1])
    fresh = [DraftingWorker(base, folder).drafts_with() for folder in others]
    before, of_base = worker.drafts_with(), proof.digests_of_model(worker.get_model())
    drafter = Drafter.of(worker)
    assert drafter is not None
    assert not list(shared_paths(worker.get_draft_model(), worker.get_model()))
    weights = drafter.learn()
    assert weights is not None
    assert not weights.with_base
    for number, folder in enumerate(others):
        update = staged(drafter, dict(weights_of(folder)))
        assert update.vote(BuildOptions, wanted=True) == digest.manifest(contents_of(dict(weights_of(folder))).values())
        assert worker.drafts_with() == before, "the vote changed what is live"
        update.check_fits()
        committed = update.commit()
        before = worker.drafts_with()
        assert before == fresh[number]
        # The first one was built, and what it recorded copies the second.
        assert bool(committed.digests) == (number == 0)
        assert all(name.startswith("draft.") for name in (*committed.contents, *committed.written, *committed.digests))
    assert proof.digests_of_model(worker.get_model()) == of_base


def test_a_drafter_is_built_with_the_configuration_that_its_speculator_has_made(folders: list[Path]) -> None:
    """It holds what differs from the base model's, as quantisation and parallel ranks."""
    worker = SpeculatingWorker(folders[0], folders[1])
    built = DrafterWorker.of(worker)
    assert built is not None
    assert built.vllm_config.parallel_config is worker.model_runner.speculator._draft_vllm_config.parallel_config


def test_wrong_weights_for_the_drafter_change_nothing(folders: list[Path]) -> None:
    worker = DraftingWorker(folders[0], folders[0])
    drafter = Drafter.of(worker)
    assert drafter is not None
    drafter.learn()
    before, tensors = worker.drafts_with(), dict(weights_of(folders[1]))
    first = next(iter(tensors))
    for wrong, message in (
        ({first: tensors[first][:1]}, "draft: .* has shape"),
        ({"other": tensors[first]}, "draft: other is not a weight"),
        ({first: torch.full_like(tensors[first], torch.nan)}, "draft: .* NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            staged(drafter, tensors | wrong)
    without = staged(drafter, {name: one for name, one in tensors.items() if name != first})
    with pytest.raises(ValueError, match=r"draft: 1 of .* tensors are missing"):
        without.vote(BuildOptions, wanted=True)
    assert not without
    drafter.discarded = "vLLM's sleep level 2 discarded the drafter's weights"
    with pytest.raises(RuntimeError, match="send the drafter too"):
        StagedDraft(drafter).vote(BuildOptions, wanted=False)
    assert worker.drafts_with() == before


def test_a_drafter_that_has_moved_since_the_vote_is_not_written_to(folders: list[Path]) -> None:
    worker = DraftingWorker(folders[0], folders[0])
    drafter = Drafter.of(worker)
    assert drafter is not None
    drafter.learn()
    update = staged(drafter, dict(weights_of(folders[1])))
    update.vote(BuildOptions, wanted=True)
    norm = worker.get_draft_model().get_parameter("model.norm.weight")
    norm.data = norm.data.clone()
    with pytest.raises(RuntimeError, match="moved since the vote: nothing was applied"):
        update.check_fits()


class Drafting(Worker):
    loaded: DraftingWorker

    def load(self, folder: Path, *, lora: bool) -> DraftingWorker:
        return DraftingWorker(folder, folder)


def test_a_drafter_must_have_room_beside_the_base_weights(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Drafting(folders[0])
    worker.context.learned.result(60)
    base = total_bytes(metas := worker.context.intake.required.values())

    def begin(source: Any, *, brings: bool) -> bool:
        staging = Staging(nbytes=base + brings * total_bytes(metas))  # the drafter is as large
        order = Begin(epoch=1, update="u", version=1, senders={}, timeout=9.0, staging=staging)
        return StagedUpdate(worker.context, order, [0]).add_source(0, source)

    streamed = SimpleNamespace(nbytes=0, sharing=None)
    in_place = SimpleNamespace(nbytes=0, sharing=SimpleNamespace(in_place=True))  # base weights need no room
    for source, free in ((streamed, base), (in_place, 0)):
        monkeypatch.setattr("areal_vllm_ext.worker.staging.free_bytes", lambda _, free=free: free)
        assert begin(source, brings=False)
        with pytest.raises(RuntimeError, match=r"needs .* of host memory for 1 workers"):
            begin(source, brings=True)
        monkeypatch.setattr("areal_vllm_ext.worker.staging.free_bytes", lambda _, free=free: free + total_bytes(metas))
        assert begin(source, brings=True)


def test_a_worker_that_returns_gets_its_peers_drafter(folders: list[Path]) -> None:
    peer, stale = Drafting(folders[1]), Drafting(folders[0])
    expected = peer.served(), peer.loaded.drafts_with()
    fetched = fetch(peer, stale, peer.offer())
    assert not fetched.error
    peer.peers.order(EndOffer(fetch=FETCH))
    stale.commit()
    assert (stale.served(), stale.loaded.drafts_with()) == expected


def test_a_peer_without_a_drafter_is_refused(folders: list[Path]) -> None:
    fetched = fetch(peer := Worker(folders[1]), Drafting(folders[0]), peer.offer())
    assert fetched.unlike
    assert "drafter" in fetched.error


def test_a_drafter_is_compared_with_what_the_last_commit_left(folders: list[Path]) -> None:
    worker = Drafting(folders[0])
    live, drafter = worker.context.live_weights, worker.context.drafter
    assert drafter is not None
    worker.context.learned.result(60)
    update = staged(drafter, dict(weights_of(folders[1])))
    update.vote(BuildOptions, wanted=True)
    base = contents_of(dict(weights_of(folders[0])))
    with live.committing(base, "one", draft=True):
        committed = update.commit()
        live.set_draft(committed.contents, committed.digests)  # as if no plan knew what was written
        live.set_written(None)
    assert not live.describe(contents=False).changed
    assert {meta.name for meta, _ in live.describe(contents=True).contents if meta.name.startswith("draft.")}
    with torch.no_grad():
        worker.loaded.get_model().get_parameter("model.norm.weight").add_(1)
    with live.committing(base, "two"):  # leaves the drafter as it is
        live.set_written(None)
    with torch.no_grad():
        worker.loaded.get_draft_model().get_parameter("model.norm.weight").add_(1)
    assert live.describe(contents=False).changed == ("draft.model.norm.weight",)


class MtpWorker(DraftingWorker):
    """A worker whose drafter is in the base model's checkpoint, and shares its embedding and head."""

    def __init__(self, folder: Path) -> None:
        LoadedWorker.__init__(self, folder, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
        from vllm.config import set_current_vllm_config
        from vllm.v1.spec_decode.eagle import EagleProposer

        proposer: Any = EagleProposer.__new__(EagleProposer)
        proposer.vllm_config = self.vllm_config
        proposer.speculative_config = self.vllm_config.speculative_config
        proposer.use_local_argmax_reduction = False
        with set_current_vllm_config(self.vllm_config):
            proposer.model = proposer._get_model()
            proposer._maybe_share_embeddings(self.get_model())
            proposer._maybe_share_lm_head(self.get_model())
        self.drafter = proposer.model
        self.model_runner = SimpleNamespace(drafter=proposer)


def with_mtp_layer(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors, and those of a layer that drafts."""
    weights, at = weights_of(folder), "model.mtp_layers.0."
    layer = {name.replace("model.layers.0.", at): one for name, one in weights.items() if ".layers.0." in name}
    width = weights["model.norm.weight"].shape[0]
    norms = {
        f"{at}{name}.weight": torch.ones(width) for name in ("token_layernorm", "hidden_layernorm", "final_layernorm")
    }
    return weights | trained(layer | norms | {f"{at}input_proj.weight": torch.zeros(width, 2 * width)}, seed)


@pytest.fixture(scope="module")
def with_mtp() -> Iterator[list[Path]]:
    """Checkpoints of one model with a layer that drafts, in three sets of weights."""
    folder = checkpoint("biases")
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(saved(with_mtp_layer(folder, seed), folder)) for seed in (1, 2, 3)]
        for one in found:
            config = json.loads((one / "config.json").read_text())
            config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
            (one / "config.json").write_text(json.dumps(config))
        yield found


def test_a_drafter_in_the_base_models_checkpoint_takes_its_own_part_of_it(with_mtp: list[Path]) -> None:
    worker, *fresh = map(MtpWorker, with_mtp)
    assert sorted(shared_paths(worker.get_draft_model(), worker.get_model())) == ["lm_head", "model.embed_tokens"]
    drafter = Drafter.of(worker)
    assert drafter is not None
    weights = drafter.learn()
    assert weights is not None
    assert weights.with_base
    own = {meta.name for meta in weights.tensors}
    assert own == {name for name in weights_of(with_mtp[0]) if "mtp_layers" in name}
    of_base = proof.digests_of_model(worker.get_model())
    for number, one in enumerate(fresh):
        tensors = {name: tensor for name, tensor in weights_of(with_mtp[number + 1]).items() if name in own}
        update = staged(drafter, tensors)
        update.vote(BuildOptions, wanted=True)
        committed = update.commit()
        assert worker.drafts_with() == one.drafts_with()
        # The base model's commit changes what is shared, so the drafter's says nothing of it.
        assert not {"draft.lm_head.weight", "draft.model.embed_tokens.weight"} & committed.digests.keys()
        assert bool(committed.digests) == (number == 0), "the second one is copied by a plan"
    assert proof.digests_of_model(worker.get_model()) == of_base
