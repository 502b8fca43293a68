"""The plan's arithmetic against simulations, published measurements and other counts."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from excite import plan
from excite.cli import app
from excite.cli.plan import quantity
from excite.create import create
from excite.errors import UsageError
from excite.training.recipe import load
from excite.verbs.plan_devices import GPUS, published_device
from excite.verbs.plan_model import (
    BACKWARD,
    Cluster,
    Device,
    Footprint,
    Work,
    all_reduce_bytes,
    all_reduce_seconds,
    buckets,
    exposed_seconds,
    step,
    stops_at,
)
from excite.verbs.plan_network import fitted, kept_bytes, profile, without_contents

FAST = Cluster(1, 8, link=1e12, inner_link=1e12, latency=0.0, inner_latency=0.0)


def ring(devices: int, pieces: int) -> int:
    """Play a ring all-reduce of one piece per device; how many pieces each device has sent when all have the sum."""
    assert pieces == devices
    holds = [[{device} for _ in range(pieces)] for device in range(devices)]
    sent = 0
    for phase, turn in itertools.product((0, 1), range(devices - 1)):
        moves = [((device - turn + phase) % devices, device) for device in range(devices)]
        parts = [(piece, (device + 1) % devices, set(holds[device][piece])) for piece, device in moves]
        for piece, to, sums in parts:
            holds[to][piece] = holds[to][piece] | sums if phase == 0 else sums
        sent += 1
    assert all(sums == set(range(devices)) for of_one in holds for sums in of_one)
    return sent


@pytest.mark.parametrize("devices", [2, 3, 4, 8, 13])
def test_bytes_of_an_all_reduce_are_those_of_a_ring_that_is_played(devices) -> None:
    size = 1000.0
    assert all_reduce_bytes(size, devices) == pytest.approx(ring(devices, devices) * size / devices)


def test_one_device_sends_nothing_and_waits_for_nobody() -> None:
    alone = step(Work(10**6, norms=(64,)), Device(100), Cluster(1, 1, 1e9, 1e9), batch=32)
    assert (alone.bytes, alone.norm_bytes, alone.exposed, alone.norms) == (0, 0, 0, 0)
    assert alone.seconds == pytest.approx(0.32)


def test_the_slower_link_on_the_way_counts() -> None:
    def cluster(nodes: int) -> Cluster:
        return Cluster(nodes, 8, link=1e9, inner_link=100e9, latency=0.0, inner_latency=0.0)

    assert all_reduce_seconds(1e9, cluster(1)) == pytest.approx(2 * 7 / 8 / 100)
    assert all_reduce_seconds(1e9, cluster(2)) == pytest.approx(2 * 15 / 16)


def played(backward: float, count: int, each: float) -> float:
    """Buckets become ready one after the other and take turns on the wire: what is left after the backward pass."""
    wire = 0.0
    for ready in range(1, count + 1):
        wire = max(wire, backward * ready / count) + each
    return wire - backward


@pytest.mark.parametrize("count", [1, 2, 5, 19])
@pytest.mark.parametrize("each", [0.0, 0.001, 0.05, 0.2, 3.0])
def test_what_the_backward_pass_hides_is_as_played(count, each) -> None:
    assert exposed_seconds(1.0, count, each) == pytest.approx(played(1.0, count, each))


def test_buckets_are_as_many_as_pytorch_makes() -> None:
    # torch's own assignment, for parameters that are small against a bucket.
    from torch.distributed import _compute_bucket_assignment_by_size as assign

    for count in (10, 1000, 7000, 30000):
        tensors = [torch.empty(1000, device="meta") for _ in range(count)]
        theirs, _ = assign([torch.empty(1000) for _ in tensors], [2**20, 25 * 2**20])
        assert buckets(1000 * count) == len(theirs)


def test_accumulation_computes_all_images_and_reduces_once() -> None:
    work, device = Work(25_000_000), Device(rate=100, fixed=0.01)
    whole = step(work, device, FAST, batch=1024)
    parts = step(work, device, FAST, batch=1024, micro_batch=32)
    assert (whole.images, whole.rounds) == (128, 1)
    assert (parts.images, parts.rounds) == (128, 4)
    assert parts.bytes == whole.bytes
    assert parts.compute - whole.compute == pytest.approx(3 * 0.01)


def test_synchronised_norms_wait_twice_for_each_norm_and_round() -> None:
    cluster = Cluster(2, 4, link=1e15, inner_link=1e15, latency=1e-3, inner_latency=0.0)
    one = step(Work(1000, norms=(64, 128)), Device(100), cluster, batch=64)
    two = step(Work(1000, norms=(64, 128)), Device(100), cluster, batch=64, micro_batch=4)
    assert one.norms == pytest.approx(2 * 2 * 2e-3)
    assert two.norms == pytest.approx(2 * one.norms)
    assert one.norm_bytes == pytest.approx(2 * 7 / 8 * 4 * (4 * (64 + 128) + 2))


def test_processes_that_share_cores_take_turns() -> None:
    two, four = (Cluster(1, n, 1e12, 1e12, 0.0, 0.0, cores=2, overlap=False) for n in (2, 4))
    computed = [step(Work(1), Device(100), cluster, batch=64).compute for cluster in (two, four)]
    assert computed == pytest.approx([0.32, 0.32])


@pytest.mark.parametrize(
    ("name", "precision", "published", "layers"), [("a100", "fp32", 7248, 175), ("v100", "fp32", 2855, 175)]
)
def test_eight_gpus_train_resnet_50_about_as_published(name, precision, published, layers) -> None:
    # NVIDIA, DeepLearningExamples, resnet50v1.5: 8 GPUs, where one makes 938 (TF32) and 367 (FP32) images/s. The
    # model leaves out the input and waiting for the slowest, so it comes out above, and by little.
    device = published_device(name, macs=4.089e9, layers=layers, grouped=False, precision=precision)
    cluster = Cluster(1, 8, 12.5e9, 0.8 * GPUS[name].inner_link)
    rate = 8 * 128 / step(Work(25_557_032), device, cluster, batch=8 * 128).seconds
    assert 1.0 <= rate / published < 1.05


def test_an_hour_of_imagenet_on_256_gpus_scales_about_as_published() -> None:
    # Goyal et al. (arXiv 1706.02677): ResNet-50, 32 images on each of 256 P100 in servers of 8 with 50 Gbit Ethernet;
    # the backward pass takes 120 ms; about 90 % of eight times 32 single servers.
    device = Device(rate=32 * BACKWARD / 0.120)
    few, many = (Cluster(nodes, 8, 0.8 * 50e9 / 8, 0.8 * 16e9) for nodes in (1, 32))
    seconds = [step(Work(25_557_032), device, cluster, batch=32 * cluster.size).seconds for cluster in (few, many)]
    assert 0.87 < seconds[0] / seconds[1] < 0.99


def test_memory_adds_up_and_the_largest_micro_batch_just_fits() -> None:
    needs = Footprint(parameters=25_000_000, slots=1, average=False, per_image=90e6, fixed=1e6)
    assert needs.bytes(0) == pytest.approx(3 * 100e6 + 1e6 + 1e9)
    for memory, devices, sharded in itertools.product((2e9, 16e9, 80e9), (1, 8), (False, True)):
        fits = needs.largest_micro_batch(memory, devices, sharded)
        assert needs.bytes(fits, devices, sharded) <= memory < needs.bytes(fits + 1, devices, sharded)
    assert needs.largest_micro_batch(1e9) == 0
    with_adam = Footprint(25_000_000, 2, True, 90e6)
    assert sum(with_adam.state(8, sharded=True).values()) < sum(with_adam.state(8).values())


def test_kept_bytes_are_those_of_a_real_pass() -> None:
    # A network without units of ours: a real forward pass keeps what one without contents keeps.
    torch.manual_seed(0)
    network = create("torchvision:resnet18", 10)
    real, _ = kept_bytes(network.train(), torch.randn(2, 3, 64, 64))
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    with mode:
        hollow, _ = kept_bytes(without_contents(network, mode).train(), torch.empty(2, 3, 64, 64))
    assert hollow == real


def test_a_profile_of_a_network_that_can_be_counted_by_hand() -> None:
    found = profile("resnet20+se", 10, 32, 3, "fp32")
    network = create("resnet20+se", 10)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert found.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert found.norms == tuple(norm.num_features for norm in norms)
    assert found.largest == 16 * 32 * 32 * 4
    assert not found.grouped
    assert profile("sknet29", 10, 32, 3, "fp32").grouped
    # In bfloat16 the maps are half as large, and the weights are kept once more, as they were cast.
    half = profile("resnet20+se", 10, 32, 3, "bf16")
    assert 0.49 < half.kept / found.kept < 0.56
    assert half.kept_once > found.parameters


def test_where_scaling_stops() -> None:
    sizes = [1, 2, 4, 8, 16]
    assert stops_at(sizes, [16, 8, 4, 2, 1], 1024) == (16, "")
    assert stops_at(sizes, [16, 8, 4, 3, 2], 1024) == (4, "gain")
    assert stops_at(sizes, [16, 8, 4, 2, 1], 32) == (4, "images")


def test_a_plan_agrees_with_itself_and_with_the_recipe() -> None:
    result = plan("senet-imagenet", nodes=4, devices=8, gpu_name="a100")
    assert result["step"]["images_per_device"] * 32 == result["batch"] == 1024
    seconds = result["step"]["ms"] / 1000
    assert result["images_per_second"] == pytest.approx(1024 / seconds)
    assert result["hours"] == pytest.approx(100 * math.ceil(1_281_167 / 1024) * seconds / 3600)
    assert result["memory"]["total"] < result["memory"]["device"] == 80e9
    same = next(row for row in result["scaling"] if row["devices"] == 32)
    assert same["ms"] == pytest.approx(result["step"]["ms"])
    assert [row["devices"] for row in result["scaling"]] == [2**i for i in range(10)]
    rates = [row["images_per_second"] for row in result["scaling"]]
    assert rates[:6] == sorted(rates[:6])
    assert result["step"]["norms_ms"] == 0
    assert (
        plan(load("senet-imagenet").replace({"trainer.sync_batch_norm": True}), nodes=4, gpu_name="a100")["step"][
            "norms_ms"
        ]
        > 0
    )


def test_a_slower_link_and_less_memory_show() -> None:
    recipe = load("senet-imagenet").replace({"trainer.micro_batch": None})
    fast = plan(recipe, nodes=8, devices=1, device_rate=900.0, link=12.5e9)
    slow = plan(recipe, nodes=8, devices=1, device_rate=900.0, link=12.5e7)
    assert slow["images_per_second"] < fast["images_per_second"]
    assert fast["step"]["rounds"] == 1
    tight = plan(recipe, nodes=8, devices=1, device_rate=900.0, memory=8e9)
    assert tight["step"]["rounds"] > 1
    assert tight["memory"]["total"] <= 8e9


def test_two_timings_are_met_by_the_device_that_they_make() -> None:
    device = fitted(32, half=0.060, whole=0.100, floor=0.050)
    assert [device.seconds(images) for images in (1, 16, 32)] == pytest.approx([0.050, 0.060, 0.100])
    # A GPU that waits for its host takes as long for half as for all of them: never longer for fewer.
    bound = fitted(32, half=0.032, whole=0.0305, floor=0.0287)
    assert bound.seconds(32) == pytest.approx(0.0305)
    assert 0.0287 <= bound.seconds(8) <= bound.seconds(16) <= bound.seconds(32)


def test_a_step_is_timed_here_where_no_rate_is_given() -> None:
    result = plan(load("digits").replace({"trainer.device": "cpu"}), devices=1)
    assert "measured" in result["device"]["source"]
    assert result["images"] > 1000
    # One device, one micro-batch after the other: nothing to wait for.
    assert result["device"]["images_per_second"] == pytest.approx(result["images_per_second"])
    assert result["memory"]["device"] is None


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("100Gb", 12.5e9),
        ("600GB", 600e9),
        ("12.5 GB/s", 12.5e9),
        ("25Gbps", 3.125e9),
        ("80GiB", 80 * 2**30),
        ("8b", 1),
    ],
)
def test_quantities_tell_bits_from_bytes(text, bytes_) -> None:
    assert quantity(text, "--link") == pytest.approx(bytes_)


@pytest.mark.parametrize("text", ["fast", "100", "GB", "-1GB", "0GB", "1e9GB", "100Gx", ""])
def test_a_wrong_quantity_is_refused(text) -> None:
    with pytest.raises(UsageError, match="--link"):
        quantity(text, "--link")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gpu_name": "a1000"}, "did you mean 'a100'"),
        ({"gpu_name": "a100", "device_rate": 5.0}, "one of"),
        ({"device_rate": -1.0}, "device rate is -1.0"),
        ({"device_rate": 1.0, "nodes": 1000}, "too many"),
        ({"device_rate": 1.0, "nodes": 3}, "take 1008 or 1032"),
        ({"device_rate": 1.0, "link": 0.0}, "link is 0.0"),
    ],
)
def test_what_makes_no_plan_is_refused(arguments, said) -> None:
    with pytest.raises(UsageError, match=said):
        plan("senet-imagenet", **arguments)


def test_data_of_unknown_size_and_other_tasks_are_refused() -> None:
    with pytest.raises(UsageError, match="how many training images"):
        plan(load("senet-imagenet").replace({"data.path": "/nowhere/at-all"}), device_rate=1.0)
    given = plan(
        load("sknet-cifar").replace({"data.path": "/nowhere/at-all"}), device_rate=1.0, images=1000, classes=5
    )
    assert given["images"] == 1000
    with pytest.raises(UsageError, match="bf16"):
        plan(load("sknet-cifar").replace({"trainer.precision": "bf16"}), gpu_name="v100")


def test_the_command_prints_a_plan() -> None:
    arguments = ["plan", "sknet-cifar", "--gpu", "v100", "--devices", "4", "--link", "10Gb"]
    printed = CliRunner().invoke(app, arguments)
    assert printed.exit_code == 0, printed.output
    assert "stops scaling" in printed.stdout
    asked = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(asked.stdout)["step"]["images_per_device"] == 32
