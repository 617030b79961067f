"""Steps: pieces, bounds, pipelines against schedules that are run, and hand-computed decoding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.cluster import Cluster
from simulator.exchange import CONTEXT, EXPERT, TENSOR, kv_elements_per_token, layer_exchanges
from simulator.inference import inference_step
from simulator.pieces import (
    BUBBLE,
    DATA,
    OPTIMIZER_STEP,
    PIPELINE,
    RECOMPUTED,
    StepEstimate,
    slowest_stage,
    total_seconds,
)
from simulator.recipe import RECIPES
from simulator.step import (
    LayerTimes,
    distinct_shapes,
    layer_times,
    replicated_parameters,
    training_step,
)
from tests.simulator.pipelines import makespan
from workloads.models.config import TransformerConfig, load_hf_config
from workloads.models.parameters import count_parameters
from workloads.models.transformer import (
    Inference,
    TrainStep,
    decode_step,
    model_flops,
    prefill_step,
    train_step,
)
from workloads.numeric import Num
from workloads.plan import Plan, Recompute

BF16 = RECIPES["bf16"]
MODELS = ("llama3-8b", "deepseek-v3", "gemma-2-9b", "gpt2", "opt-6.7b", "mixtral-8x7b")
H100 = catalog.cluster("hgx-h100", nodes=16)
L40S = catalog.cluster("l40s-pcie-8", nodes=16)


def model(name: str) -> TransformerConfig:
    return load_hf_config(f"examples/{name}.json")


LLAMA = model("llama3-8b")


def run(step: TrainStep, plan: Plan, on: Cluster = H100) -> StepEstimate:
    return training_step(step, plan=plan, on=on, recipe=BF16)


def train(cfg: TransformerConfig, *, batch: int, len_seq: int = 4096) -> TrainStep:
    return train_step(cfg, len_seq=len_seq, global_batch=batch)


plans = st.builds(
    Plan,
    dp=st.sampled_from([1, 2, 8]),
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 2, 3, 4]),
    cp=st.sampled_from([1, 2, 4]),
    micro_batch=st.sampled_from([1, 2, 4]),
    interleave=st.sampled_from([1, 2]),
    recompute=st.sampled_from([Recompute.NONE, Recompute.FULL]),
    zero_stage=st.integers(0, 3),
)


def fitting(name: str, plan: Plan, num_micro: int) -> tuple[TrainStep, Plan]:
    """The plan with experts spread where there are some, and a batch of that many micro-batches."""
    cfg = model(name)
    if cfg.moe:
        plan = replace(plan, ep=min(plan.dp * plan.cp, 8))
    if plan.pp == 1:
        plan = replace(plan, interleave=1)
    batch = int(plan.dp * plan.micro_batch) * num_micro
    return train(cfg, batch=batch, len_seq=2048), plan


# ---- pieces and bounds ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(MODELS),
    plan=plans,
    num_micro=st.sampled_from([1, 2, 8, 32]),
    on=st.sampled_from([H100, L40S]),
)
def test_pieces_add_up_between_the_bounds(
    name: str, plan: Plan, num_micro: int, on: Cluster
) -> None:
    step, plan = fitting(name, plan, num_micro)
    e = run(step, plan, on)
    pieces = {k: float(v) for k, v in e.seconds_by_piece.items()}
    assert min(pieces.values()) >= -1e-12 * e.seconds, pieces
    assert e.seconds == pytest.approx(sum(pieces.values()), rel=1e-12)
    assert e.lower_s <= e.seconds * (1 + 1e-12)
    assert e.seconds <= e.upper_s * (1 + 1e-12)
    assert 0 < e.mfu_frac <= 1
    assert e.model_flops == model_flops(step.config, step.len_seq, step.num_tokens)
    flops = e.mfu_frac * e.peak_flops_per_s * plan.num_ranks * e.seconds
    assert flops == pytest.approx(e.model_flops, rel=1e-12)
    assert e.tokens_per_s * e.seconds == pytest.approx(step.num_tokens, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(MODELS), plan=plans, num_micro=st.sampled_from([1, 4]))
def test_resources_split_the_kernels_of_the_slowest_stage(
    name: str, plan: Plan, num_micro: int
) -> None:
    step, plan = fitting(name, plan, num_micro)
    e = run(step, plan)
    exchanges = (TENSOR, CONTEXT, EXPERT, PIPELINE, BUBBLE, DATA, OPTIMIZER_STEP)
    kernels = sum(float(v) for k, v in e.seconds_by_piece.items() if k not in exchanges)
    assert sum(map(float, e.compute_by_resource.values())) == pytest.approx(kernels, rel=1e-9)
    assert e.bound in (*e.compute_by_resource, *exchanges)


def test_one_gpu_has_no_exchange() -> None:
    e = run(train(LLAMA, batch=4), Plan())
    for piece in (TENSOR, CONTEXT, PIPELINE, BUBBLE, DATA, RECOMPUTED):
        assert e.seconds_by_piece[piece] == 0, piece
    assert e.seconds == pytest.approx(e.lower_s, rel=1e-12)
    assert e.bound == "tensor"
    # 28 bytes a parameter: gradient, master, two moments read; three written with the weight.
    moved = 30 * count_parameters(LLAMA).total
    assert e.seconds_by_piece[OPTIMIZER_STEP] == pytest.approx(moved / 3.352e12, rel=0.02)


def test_the_largest_piece_is_named() -> None:
    step = train(model("gpt2"), batch=64, len_seq=128)
    assert run(step, Plan(dp=64), L40S).bound == DATA
    assert run(train(LLAMA, batch=1), Plan(tp=8, pp=16)).bound == BUBBLE


# ---- recomputation -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_full_recompute_is_one_more_forward_of_the_layers(name: str) -> None:
    cfg = model(name)
    step, plan = train(cfg, batch=8), Plan(tp=2)
    times = layer_times(step, plan=plan, on=H100, recipe=BF16)
    kept = run(step, plan)
    redone = run(step, replace(plan, recompute=Recompute.FULL))
    forward = 8 * cfg.num_layers * times.forward.lower_s
    assert redone.seconds_by_piece[RECOMPUTED] == pytest.approx(forward, rel=1e-12)
    assert kept.seconds_by_piece[RECOMPUTED] == 0
    exposed = 8 * cfg.num_layers * sum(map(float, times.exposed_forward.values()))
    assert redone.seconds - kept.seconds == pytest.approx(forward + exposed, rel=1e-9)
    selective = run(step, replace(plan, recompute=Recompute.SELECTIVE))
    assert selective.seconds == kept.seconds


# ---- the pipeline --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    p=st.integers(1, 6),
    m=st.integers(1, 12),
    f=st.integers(1, 9),
    b=st.integers(1, 9),
    first=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    more=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_the_closed_form_is_1f1b_with_the_head_on_the_slowest_stage(
    p: int, m: int, f: int, b: int, first: tuple[int, int], more: tuple[int, int]
) -> None:
    """m max + (sum - max) is exact when no pass of the last stage is shorter than another's."""
    forward, backward = [f] * p, [b] * p
    forward[0] += first[0]
    backward[0] += first[1]
    if p > 1:
        forward[-1], backward[-1] = forward[0] + more[0], backward[0] + more[1]
    total = [x + y for x, y in zip(forward, backward, strict=True)]
    assert makespan(forward, backward, m) == m * max(total) + sum(total) - max(total)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12),
    f=st.integers(1, 9),
    b=st.integers(1, 9),
    p=st.integers(2, 6),
    more=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_the_closed_form_is_a_bound_with_the_embedding_on_the_slowest_stage(
    m: int, f: int, b: int, p: int, more: tuple[int, int]
) -> None:
    """A slower first stage works ahead while the first micro-batch travels: at most the form."""
    forward, backward = [f + more[0]] + [f] * (p - 1), [b + more[1]] + [b] * (p - 1)
    total = [x + y for x, y in zip(forward, backward, strict=True)]
    spent = makespan(forward, backward, m)
    form = m * max(total) + sum(total) - max(total)
    assert form - (sum(total) - max(total)) <= spent <= form


@pytest.mark.parametrize(("p", "v", "groups"), [(2, 2, 1), (4, 2, 3), (4, 4, 2), (8, 3, 2)])
def test_interleaving_divides_the_bubble(p: int, v: int, groups: int) -> None:
    """Equal chunks: m t + (p - 1) t / v, as the schedule runs it."""
    m, f, b = groups * p, 2.0, 4.0  # per chunk
    assert makespan([f] * p, [b] * p, m, v) == m * v * (f + b) + (p - 1) * (f + b)


@pytest.mark.parametrize(("pp", "v"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 4)])
@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.FULL])
def test_kernels_take_what_the_schedule_takes(pp: int, v: int, recompute: Recompute) -> None:
    """llama3-8b without communication (pp only, sends taken off) against the schedule's run."""
    step, plan = train(LLAMA, batch=16), Plan(pp=pp, interleave=v, recompute=recompute)
    e = run(step, plan)
    t = layer_times(step, plan=Plan(), on=H100, recipe=BF16)
    layers = LLAMA.num_layers / (pp * v)
    again = t.forward.lower_s * (recompute == Recompute.FULL)
    spent = float(e.seconds) - float(e.seconds_by_piece[PIPELINE] + e.seconds_by_piece[DATA])
    spent -= float(e.seconds_by_piece[OPTIMIZER_STEP])
    if v == 1:
        forward, backward = (
            [layers * x] * pp for x in (t.forward.lower_s, t.backward.lower_s + again)
        )
        forward[0] += t.embedding.lower_s / 3
        backward[0] += t.embedding.lower_s * 2 / 3
        forward[-1] += t.head.lower_s / 3
        backward[-1] += t.head.lower_s * 2 / 3
        assert spent == pytest.approx(makespan(forward, backward, 16), rel=1e-9)
        return
    layer_s = t.forward.lower_s + t.backward.lower_s + again
    stage_s = v * layers * layer_s
    ends_s = 16 * t.head.lower_s + t.embedding.lower_s / v
    assert spent == pytest.approx((16 + (pp - 1) / v) * stage_s + ends_s, rel=1e-9)


@pytest.mark.parametrize(("pp", "v"), [(2, 1), (4, 1), (4, 2), (8, 4)])
def test_the_bubble_of_equal_stages(pp: int, v: int) -> None:
    """(p - 1) / v stage times, whatever the number of micro-batches."""
    cfg = replace(LLAMA, vocab_size=1)  # ends that cost next to nothing
    bubbles = [
        float(run(train(cfg, batch=b), Plan(pp=pp, interleave=v)).seconds_by_piece[BUBBLE])
        for b in (8, 64)
    ]
    t = layer_times(train(cfg, batch=8), plan=Plan(), on=H100, recipe=BF16)
    stage_s = cfg.num_layers / pp * (t.forward.lower_s + t.backward.lower_s)
    assert bubbles[0] == bubbles[1] == pytest.approx((pp - 1) / v * stage_s, rel=5e-3)


def test_layers_that_do_not_divide_wait_for_the_fullest_stage() -> None:
    cfg = replace(LLAMA, num_layers=10, vocab_size=1)
    e = run(train(cfg, batch=32), Plan(pp=4))
    t = layer_times(train(cfg, batch=32), plan=Plan(), on=H100, recipe=BF16)
    layer_s = t.forward.lower_s + t.backward.lower_s
    assert e.seconds_by_piece[BUBBLE] == pytest.approx(7 * layer_s, rel=5e-3)
    assert float(e.seconds) > 32 * 3 * layer_s


# ---- monotonic -----------------------------------------------------------------------------


def faster(on: Cluster, factor: float) -> dict[str, Cluster]:
    """The cluster with one rate raised, each in turn."""
    d = on.device
    hbm = replace(d.hbm, bytes_per_s=d.hbm.bytes_per_s * factor)  # type: ignore[operator]
    tensor = {k: factor * v for k, v in d.tensor_flops_per_s.items()}
    better = {
        "hbm": replace(on, device=replace(d, memory=(*d.memory[:-1], hbm))),
        "tensor": replace(on, device=replace(d, tensor_flops_per_s=tensor)),
    }
    for i, level in enumerate(on.levels):
        wider = replace(level, bytes_per_s=level.bytes_per_s * factor)
        better[level.name] = replace(on, levels=(*on.levels[:i], wider, *on.levels[i + 1 :]))
    return better


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(MODELS),
    plan=plans,
    num_micro=st.sampled_from([1, 8]),
    on=st.sampled_from([H100, L40S]),
)
def test_better_hardware_is_never_slower(
    name: str, plan: Plan, num_micro: int, on: Cluster
) -> None:
    step, plan = fitting(name, plan, num_micro)
    before = run(step, plan, on)
    for what, better in faster(on, 1.5).items():
        after = run(step, plan, better)
        assert after.seconds <= before.seconds * (1 + 1e-12), what
        assert after.lower_s <= before.lower_s * (1 + 1e-12), what
        assert after.upper_s <= before.upper_s * (1 + 1e-12), what


@pytest.mark.parametrize("dp", [2, 8, 16])
def test_replicas_with_their_own_batch_compute_no_longer(dp: int) -> None:
    """Weak scaling: what is added is exchange alone."""
    one, many = (run(train(LLAMA, batch=4 * n), Plan(tp=8, dp=n, zero_stage=0)) for n in (1, dp))
    for piece, seconds in one.seconds_by_piece.items():
        if piece != DATA:
            assert many.seconds_by_piece[piece] == pytest.approx(seconds, rel=1e-12), piece
    assert many.seconds_by_piece[DATA] > 0 == one.seconds_by_piece[DATA]
    assert many.lower_s == pytest.approx(one.lower_s, rel=1e-12)


def test_a_larger_batch_takes_proportionally_longer() -> None:
    small, large = (run(train(LLAMA, batch=b), Plan()) for b in (4, 8))
    update = small.seconds_by_piece[OPTIMIZER_STEP]
    assert large.seconds - update == pytest.approx(2 * (small.seconds - update), rel=1e-12)


# ---- exchange ------------------------------------------------------------------------------


def exchanges(cfg: TransformerConfig, kind: str, **plan: int) -> dict[str, list[float]]:
    """Bytes that the collectives of one forward pass take in, by piece and collective."""
    found: dict[str, list[float]] = {}
    made = layer_exchanges(cfg, kind, len_seq=4096, plan=Plan(**plan), element_bytes=2)
    for x in made:
        found.setdefault(x.piece, []).append(float(x.forward * x.collective.num_bytes))
    return found


def test_tensor_parallel_gathers_and_scatters_each_block() -> None:
    """Korthikanti et al. 2022: two all-gathers and two reduce-scatters of s b h each way."""
    hidden = 4096 * 4096 * 2
    assert sum(exchanges(LLAMA, "dense", tp=8)[TENSOR]) == 4 * hidden
    e = run(train(LLAMA, batch=1), Plan(tp=8))
    expected = 32 * 8 * (7 / 8) * hidden / 450e9
    assert e.seconds_by_piece[TENSOR] == pytest.approx(expected, rel=1e-9)


def test_routed_rows_are_gathered_one_for_each_expert_chosen() -> None:
    """Behind an all-to-all: Mixtral two experts a token, DeepSeek-V3 eight and a shared one."""
    hidden = 4096 * 4096 * 2
    mixtral = model("mixtral-8x7b")
    assert sum(exchanges(mixtral, "moe", tp=8, dp=2, ep=2)[TENSOR]) == 2 * (1 + 2) * hidden
    assert sum(exchanges(mixtral, "moe", tp=8)[TENSOR]) == 4 * hidden
    hidden = 4096 * 7168 * 2
    deepseek = model("deepseek-v3")
    assert sum(exchanges(deepseek, "moe", tp=8, dp=2, ep=2)[TENSOR]) == 2 * (1 + 9) * hidden
    assert sum(exchanges(deepseek, "dense", tp=8)[TENSOR]) == 4 * hidden


def test_tokens_go_to_their_experts_and_back() -> None:
    deepseek = model("deepseek-v3")
    found = exchanges(deepseek, "moe", tp=2, dp=8, ep=8)
    assert found[EXPERT] == [2048 * 8 * 7168 * 2] * 2
    assert EXPERT not in exchanges(deepseek, "dense", dp=8, ep=8)
    made = layer_exchanges(
        deepseek, "moe", len_seq=4096, plan=Plan(tp=2, dp=8, ep=8), element_bytes=2
    )
    assert {x.piece: x.stride for x in made} == {TENSOR: 1, EXPERT: 2}


def test_the_ring_passes_what_attention_takes() -> None:
    """K and V of the rank's own heads: once round, and twice again on the way back."""
    t = layer_times(train(LLAMA, batch=1), plan=Plan(cp=4), on=H100, recipe=BF16)
    assert t.exchange_forward[CONTEXT] == pytest.approx(3 * 1024 * 2 * 8 * 128 * 2 / 450e9)
    assert kv_elements_per_token(LLAMA, 4) == 2 * 2 * 128
    assert kv_elements_per_token(LLAMA, 16) == 2 * 128
    # Latent attention: 128 heads of 192 + 128, expanded; no op counts a second expansion.
    assert kv_elements_per_token(model("deepseek-v3"), 8) == 16 * (192 + 128)


def test_the_ring_hides_under_attention_or_shows_its_excess() -> None:
    """Long sequences hide it on NVLink, all but the last gradients; short ones cannot."""
    hidden = run(train(LLAMA, batch=1, len_seq=131072), Plan(cp=8))
    last_s = 32 * 16384 * 2 * 8 * 128 * 2 / 450e9
    assert hidden.seconds_by_piece[CONTEXT] == pytest.approx(last_s, rel=1e-9)
    assert hidden.upper_s > hidden.seconds
    step, plan = train(LLAMA, batch=1, len_seq=2048), Plan(tp=8, cp=8)
    shown = run(step, plan, L40S)
    t = layer_times(step, plan=plan, on=L40S, recipe=BF16)
    bytes_ = 256 * 2 * 128 * 2
    assert t.exchange_forward[CONTEXT] == pytest.approx(7 * bytes_ / 25e9, rel=1e-9)
    assert t.exposed_forward[CONTEXT] < t.exchange_forward[CONTEXT]
    assert shown.seconds_by_piece[CONTEXT] > 0


def test_the_ring_runs_twice_on_the_way_back() -> None:
    """K and V once more, and their gradients."""
    t = layer_times(train(LLAMA, batch=1), plan=Plan(cp=8), on=H100, recipe=BF16)
    twice = 2 * t.exchange_forward[CONTEXT]
    assert t.exchange_backward[CONTEXT] == pytest.approx(twice, rel=1e-12)
    assert twice > 0


def test_sends_show_while_the_pipeline_fills_and_drains() -> None:
    """Three hops of one micro-batch's activations each way, rows split over tp."""
    on_nodes = run(train(LLAMA, batch=8), Plan(tp=8, pp=4))
    hop_s = 4096 / 8 * 4096 * 2 / 50e9
    assert on_nodes.seconds_by_piece[PIPELINE] == pytest.approx(6 * hop_s, rel=1e-12)
    inside = run(train(LLAMA, batch=8), Plan(tp=2, pp=4))
    hop_s = 4096 / 2 * 4096 * 2 / 450e9
    assert inside.seconds_by_piece[PIPELINE] == pytest.approx(6 * hop_s, rel=1e-12)


def test_what_hides_the_ring_hides_no_gradients() -> None:
    """gpt2, cp = 4: the window for gradients is the backward pass less the hidden ring."""
    cfg, plan = model("gpt2"), Plan(cp=4)
    step = train(cfg, batch=1, len_seq=2048)
    t = layer_times(step, plan=plan, on=H100, recipe=BF16)
    hidden = t.exchange_backward[CONTEXT] - t.exposed_backward[CONTEXT]
    assert hidden > 0
    reduce_s = 5 / 4 * 4 * count_parameters(cfg).total / 450e9
    expected = reduce_s - 12 * (t.backward.lower_s - hidden)
    assert expected > 0
    assert run(step, plan).seconds_by_piece[DATA] == pytest.approx(expected, rel=1e-4)


def test_a_ring_over_two_nodes_waits_for_the_network() -> None:
    step = train(LLAMA, batch=1, len_seq=16384)
    inside, outside = (
        layer_times(step, plan=Plan(cp=cp), on=H100, recipe=BF16).exchange_forward[CONTEXT]
        for cp in (8, 16)
    )
    assert inside == pytest.approx(7 * 2048 * 2048 * 2 / 450e9, rel=1e-9)
    assert outside == pytest.approx(15 * 1024 * 2048 * 2 / 50e9, rel=1e-9)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_exchanges_by_hand(zero: int) -> None:
    """8 H100s of a node, 4 micro-batches of gpt2: nothing else is exchanged."""
    cfg = model("gpt2")
    e = run(train(cfg, batch=32, len_seq=128), Plan(dp=8, zero_stage=zero))
    n = count_parameters(cfg).total
    shard = 7 / 8 * n / 450e9
    t = layer_times(train(cfg, batch=32, len_seq=128), plan=Plan(), on=H100, recipe=BF16)
    forward, backward = (12 * float(x.lower_s) for x in (t.forward, t.backward))
    reduce_s, gather_s = 4 * shard, 2 * shard
    if zero == 0:
        expected = max(9 / 8 * 4 * n / 450e9 - backward, 0)  # reduced in the switch
    elif zero == 1:
        expected = max(reduce_s - backward, 0) + max(gather_s - forward, 0)
    elif zero == 2:
        # Gradients of one micro-batch are reduced under the next one's passes as well.
        room = 4 * backward + 3 * forward
        expected = max(reduce_s - backward, 4 * reduce_s - room, 0) + max(gather_s - forward, 0)
    else:
        expected = max(4 * (2 * gather_s + reduce_s) - 4 * (forward + backward), 0)
    assert expected > 0
    assert e.seconds_by_piece[DATA] == pytest.approx(expected, rel=1e-4)


def test_experts_have_fewer_replicas_farther_apart() -> None:
    cfg = model("mixtral-8x7b")
    (dense, replicas, stride), (experts, owners, far) = replicated_parameters(
        cfg, Plan(dp=16, tp=2, cp=2, ep=8)
    )
    assert (replicas, stride, owners, far) == (32, 2, 4, 16)
    assert dense < experts  # one expert of eight, on every layer, is still more


def test_zero_updates_a_shard() -> None:
    whole, shard = (
        run(train(LLAMA, batch=8), Plan(dp=8, zero_stage=z)).seconds_by_piece[OPTIMIZER_STEP]
        for z in (0, 1)
    )
    assert shard == pytest.approx(whole / 8, rel=1e-3)


# ---- arrays --------------------------------------------------------------------------------


def some_plans(seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    pp = rng.choice([1.0, 2.0, 4.0, 8.0], count)
    return {
        "dp": rng.choice([1.0, 2.0, 8.0], count),
        "tp": rng.choice([1.0, 2.0, 4.0, 8.0], count),
        "pp": pp,
        "cp": rng.choice([1.0, 2.0], count),
        "ep": np.ones(count),
        "micro_batch": rng.choice([1.0, 2.0], count),
        "interleave": np.where(pp > 1, rng.choice([1.0, 2.0], count), 1.0),
        "recompute": rng.choice([0.0, 2.0], count),
        "zero_stage": rng.choice([0.0, 1.0, 2.0, 3.0], count),
    }


def same(many: StepEstimate, i: int, one: StepEstimate) -> None:
    for a, b in ((many.seconds, one.seconds), (many.lower_s, one.lower_s),
                 (many.upper_s, one.upper_s), (many.mfu_frac, one.mfu_frac)):  # fmt: skip
        assert np.asarray(a)[i] == pytest.approx(b, rel=1e-9)
    for piece, seconds in one.seconds_by_piece.items():
        got = np.broadcast_to(np.asarray(many.seconds_by_piece[piece]), np.shape(many.seconds))[i]
        assert got == pytest.approx(float(seconds), rel=1e-9, abs=1e-12 * one.seconds), piece


@pytest.mark.parametrize("name", MODELS)
def test_arrays_agree_with_scalars(name: str) -> None:
    """Also: shapes shared by plans are timed once and handed back to the right plans."""
    step, columns = train(model(name), batch=64, len_seq=1024), some_plans(7, 24)
    many = run(step, Plan(**columns))
    for i in range(24):
        same(many, i, run(step, Plan(**{k: int(v[i]) for k, v in columns.items()})))


def test_shared_shapes_are_found_again() -> None:
    plan = Plan(**some_plans(9, 500))
    shapes, inverse = distinct_shapes(plan)
    assert inverse is not None
    assert np.size(shapes.tp) == 4 * 2 * 2
    for field in ("tp", "cp", "ep", "micro_batch"):
        assert np.array_equal(np.asarray(getattr(shapes, field))[inverse], getattr(plan, field))
    assert distinct_shapes(Plan(tp=2)) == (Plan(tp=2), None)


def test_lengths_pair_up_with_plans() -> None:
    """An array of sequence lengths beside one of plans: element by element, in the given order."""
    lengths, micro, tp = np.array([8192.0, 512.0, 2048.0]), np.array([2.0, 1.0, 4.0]), 2
    cfg = LLAMA
    many = run(
        train_step(cfg, len_seq=lengths, global_batch=8),
        Plan(micro_batch=micro, tp=np.full(3, 2.0)),
    )
    for i in range(3):
        one = train_step(cfg, len_seq=int(lengths[i]), global_batch=8)
        same(many, i, run(one, Plan(micro_batch=int(micro[i]), tp=tp)))


def test_a_sweep_of_lengths_under_one_plan() -> None:
    lengths = np.array([512.0, 2048.0, 8192.0])
    many = run(train_step(LLAMA, len_seq=lengths, global_batch=8), Plan(tp=2))
    for i in range(3):
        same(many, i, run(train(LLAMA, batch=8, len_seq=int(lengths[i])), Plan(tp=2)))


# ---- inference -----------------------------------------------------------------------------


def infer(step: Inference, plan: Plan | None = None, on: Cluster = H100) -> StepEstimate:
    return inference_step(step, plan=plan or Plan(), on=on, recipe=BF16)


def test_decoding_one_sequence_reads_the_weights() -> None:
    """llama3-8b: 7 504 924 672 weights that a token meets, one row of K/V cache per position."""
    e = infer(decode_step(LLAMA, batch=1, len_context=8192))
    weights, cache = 2 * 7_504_658_432, 8192 * 131072
    floor_s = (weights + cache) / 3.352e12
    assert floor_s <= e.seconds < 1.02 * floor_s
    assert e.bound == "hbm"
    assert e.num_tokens == 1
    per_token = 2 * 7_504_658_432 + 4 * 32 * 32 * 128 * (8192 - 0.5)
    assert e.model_flops == pytest.approx(per_token, rel=1e-9)


def test_prefill_is_bound_by_the_tensor_cores() -> None:
    e = infer(prefill_step(LLAMA, batch=1, len_context=8192))
    assert e.bound == "tensor"
    assert 0.7 < e.mfu_frac < 1
    assert e.model_flops == pytest.approx(17.156800512e9 * 8192 - 2 * 0, rel=1e-9)


def test_latent_decoding_reads_the_latent() -> None:
    """DeepSeek-V3, absorbed: 576 elements a token and layer, not 128 heads of K and V."""
    cfg = model("deepseek-v3")
    step = decode_step(cfg, batch=64, len_context=65536)
    nodes = step.layer("moe", Plan())
    attention = [n for n in nodes if n.op.name == "flash_attention_2"]
    assert [(n.op.head_dim, n.op.value_dim, n.op.num_kv_heads) for n in attention] == [  # type: ignore[attr-defined]
        (576, 512, 1)
    ]
    once = total_seconds(attention, on=H100.device)
    cache_s = 64 * 65536 * 576 * 2 / 3.352e12
    assert once.lower_s > cache_s
    expanded_s = 64 * 65536 * 128 * 320 * 2 / 3.352e12
    assert once.lower_s < expanded_s / 10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [prefill_step, decode_step])
@pytest.mark.parametrize("plan", [Plan(), Plan(tp=8), Plan(tp=2, pp=4), Plan(dp=4, pp=2)])
def test_inference_lies_between_its_bounds(name: str, make, plan: Plan) -> None:  # type: ignore[no-untyped-def]
    step = make(model(name), batch=4, len_context=2048)
    for on in (H100, L40S):
        e = infer(step, plan, on)
        assert e.lower_s <= e.seconds * (1 + 1e-12)
        assert e.seconds <= e.upper_s * (1 + 1e-12)
        assert min(map(float, e.seconds_by_piece.values())) >= 0
        assert 0 < e.mfu_frac <= 1
        assert e.num_tokens == plan.dp * plan.pp * step.num_tokens


def test_slots_and_replicas_advance_together() -> None:
    step = decode_step(LLAMA, batch=8, len_context=4096)
    one, two = infer(step), infer(step, Plan(dp=2))
    assert two.seconds == one.seconds
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s, rel=1e-12)
    staged = infer(step, Plan(pp=4))
    assert staged.num_tokens == 4 * one.num_tokens
    assert staged.seconds_by_piece[PIPELINE] > 0 == one.seconds_by_piece[PIPELINE]


def test_windows_bound_what_decoding_reads() -> None:
    cfg = model("mistral-7b-v0.1")
    assert cfg.window == 4096
    short, long = (infer(decode_step(cfg, batch=8, len_context=n)) for n in (4096, 65536))
    assert long.seconds == pytest.approx(short.seconds, rel=1e-3)
    assert long.model_flops == pytest.approx(short.model_flops, rel=1e-3)


def test_decoding_over_arrays_agrees_with_scalars() -> None:
    batch = np.array([1.0, 16.0, 256.0])
    many = infer(decode_step(LLAMA, batch=batch, len_context=2048), Plan(tp=4))
    for i in range(3):
        one = infer(decode_step(LLAMA, batch=int(batch[i]), len_context=2048), Plan(tp=4))
        same(many, i, one)


def test_the_first_position_counts_as_one() -> None:
    for name in MODELS:
        assert infer(decode_step(model(name), batch=1, len_context=1)).model_flops > 0
    e = infer(decode_step(LLAMA, batch=1, len_context=1))
    assert e.model_flops == pytest.approx(2 * 7_504_658_432 + 4 * 32 * 32 * 128 / 2, rel=1e-9)


# ---- kinds of layers -----------------------------------------------------------------------


def test_layer_kinds_are_averaged_by_their_number() -> None:
    cfg = model("deepseek-v3")
    step, plan = train(cfg, batch=1), Plan(tp=8)
    found: LayerTimes = layer_times(step, plan=plan, on=H100, recipe=BF16)
    by_hand: Num = 0.0
    for kind, count in (("dense", 3), ("moe", 58)):
        nodes = step.layer(kind, plan).select(phase="forward")
        by_hand += count / 61 * total_seconds(nodes, on=H100.device).lower_s
    assert found.forward.lower_s == pytest.approx(by_hand, rel=1e-12)


def test_time_goes_to_one_binding_resource() -> None:
    t = total_seconds(train(LLAMA, batch=1).layer("dense", Plan()), on=H100.device)
    assert sum(map(float, t.by_resource.values())) == pytest.approx(t.lower_s, rel=1e-12)
    assert sum(map(float, t.by_part.values())) == pytest.approx(t.lower_s, rel=1e-12)
    assert t.by_resource["tensor"] > 0.5 * t.lower_s


def test_the_last_stage_holds_what_is_left() -> None:
    """126 layers on 16 stages: fifteen of 8 and a last one of 6 beside the head."""
    plans = Plan(pp=np.array([1.0, 16.0, 16.0, 32.0]))
    head = np.array([1.0, 1.0, 3.0, 3.0])
    layers, embedding, at_head = slowest_stage(126, 1.0, 0.1, head, plans)
    assert np.array_equal(layers, [126, 8, 6, 2])
    assert np.array_equal(embedding, [1, 1, 0, 0])
    assert np.array_equal(at_head, [1, 0, 1, 1])
    assert slowest_stage(61, 1.0, 0.1, 3.0, Plan(pp=32)) == (0, 0.0, 1.0)


def test_ragged_stages_hide_the_head() -> None:
    """The spare slots of a ragged split are at the end, so that the head costs less."""
    step = train_step(model("deepseek-v3"), len_seq=4096, global_batch=1024)
    on = catalog.cluster("hgx-h100", nodes=32)
    plan = Plan(dp=8, pp=32, ep=8, zero_stage=1)
    e = training_step(step, plan=plan, on=on, recipe=RECIPES["bf16"])
    times = layer_times(step, plan=plan, on=on, recipe=RECIPES["bf16"])
    layer_s = times.forward.lower_s + times.backward.lower_s
    layer_s += sum(times.exposed_forward.values()) + sum(times.exposed_backward.values())
    slowest = max(2 * layer_s + times.embedding.lower_s, times.head.lower_s)
    everything = 61 * layer_s + times.embedding.lower_s + times.head.lower_s
    pipeline = 128 * slowest + everything - slowest
    rest = sum(e.seconds_by_piece[p] for p in (PIPELINE, DATA, OPTIMIZER_STEP))
    assert e.seconds == pytest.approx(pipeline + rest, rel=1e-12)


def test_single_precision_updates_one_copy() -> None:
    step = train_step(model("gpt2"), len_seq=1024, global_batch=1)
    on = catalog.cluster("hgx-h100")
    e = training_step(step, plan=Plan(), on=on, recipe=RECIPES["fp32"])
    expected = 28 * 124_439_808 / on.device.hbm.bytes_per_s
    assert e.seconds_by_piece[OPTIMIZER_STEP] == pytest.approx(expected, rel=1e-3)
