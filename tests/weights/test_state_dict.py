import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from excite.cost import cost
from excite.create import create
from excite.errors import ExciteError, UsageError
from excite.weights.load import load_weights, read_weights


@pytest.fixture
def donor():
    torch.manual_seed(0)
    return create("resnet20+se:stages=1", 10)


def receiver():
    torch.manual_seed(1)
    return create("resnet20+se:stages=1", 10)


def assert_same(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


FORMS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best": 0.9},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "module.": lambda state: {"module." + name: tensor for name, tensor in state.items()},
    "both": lambda state: {"state_dict": {"module." + name: tensor for name, tensor in state.items()}},
    "compiled": lambda state: {"module._orig_mod." + name: tensor for name, tensor in state.items()},
    "linear": lambda state: {name.replace("fc.", "linear."): tensor for name, tensor in state.items()},
    "no counts": lambda state: {name: tensor for name, tensor in state.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_in_all_their_forms(tmp_path, donor, form, zipped):
    path = tmp_path / "weights.anything"
    torch.save(FORMS[form](donor.state_dict()), path, _use_new_zipfile_serialization=zipped)
    network = receiver()
    load_weights(network, path)
    assert_same(network, donor)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_safetensors_are_known_by_their_content(tmp_path, donor, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(donor.state_dict(), path)
    network = receiver()
    load_weights(network, path)
    assert_same(network, donor)


def test_create_takes_weights(tmp_path, donor):
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    assert_same(create("resnet20+se:stages=1", 10, weights=tmp_path / "weights.pth"), donor)


def test_a_network_that_has_a_linear_keeps_it(tmp_path):
    module = nn.ModuleDict({"linear": nn.Linear(2, 3), "fc": nn.Linear(2, 3)})
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    other = nn.ModuleDict({"linear": nn.Linear(2, 3), "fc": nn.Linear(2, 3)})
    load_weights(other, tmp_path / "weights.pth")
    assert_same(module, other)


# --- what does not fit -----------------------------------------------------------------------------------------


def refuse(network, state, path):
    torch.save(state, path)
    before = snapshot(network)
    with pytest.raises(UsageError) as refusal:
        load_weights(network, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert str(path) in str(refusal.value)
    return str(refusal.value)


def test_tensors_that_are_missing_unexpected_or_of_another_shape(tmp_path, donor):
    state = donor.state_dict()
    del state["layer2.0.bn1.bias"]
    state["layer9.weight"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(100, 64)
    message = refuse(receiver(), state, tmp_path / "weights.pth")
    assert "1 missing: layer2.0.bn1.bias" in message
    assert "1 unexpected: layer9.weight" in message
    assert "fc.weight (expected (10, 64), found (100, 64))" in message


def test_weights_of_another_network_do_not_fill_the_screen(tmp_path):
    message = refuse(create("resnet20", 10), create("resnet56", 10).state_dict(), tmp_path / "weights.pth")
    assert "and 172 more" in message  # 36 more convolutions, each with 4 tensors of its batch norm, less 8 shown
    assert len(message) < 1000


# --- files that are no weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.pth", "."])
def test_no_such_file(tmp_path, name):
    with pytest.raises(UsageError, match=r"does not exist|is a folder"):
        load_weights(nn.Linear(1, 1), tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"PK\x03\x04", b"not a file of weights", b"\x00" * 64, b"\x89PNG\r\n\x1a\n" + b"x" * 50]
)
def test_files_of_something_else(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ExciteError, match="expected a PyTorch state dict") as refusal:
        load_weights(nn.Linear(1, 1), tmp_path / "weights.pth")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_files_cut_off_anywhere(tmp_path, form):
    module = nn.Linear(30, 20)
    path = tmp_path / "weights"
    if form == "safetensors":
        save_file(module.state_dict(), path)
    else:
        torch.save(module.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    before = snapshot(module)
    # Cut within the name of a function that it calls, an old pickle asks for one that nobody allows.
    message = r"cut off|could run code" if form == "legacy" else "cut off"
    for length in sorted({*range(0, len(whole), 37), len(whole) - 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(ExciteError, match=message) as refusal:
            load_weights(module, path)
        assert "\n" not in str(refusal.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


class Attack:
    """A pickle that runs a command when opened."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, how):
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    content = {"state_dict": nn.Linear(1, 1).state_dict(), "extra": Attack(trace)}
    if how == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    torch.load(path, weights_only=False) if how != "bare" else pickle.loads(path.read_bytes())
    assert trace.exists()  # the attack is a real one
    trace.unlink()
    with pytest.raises(ExciteError) as refusal:
        load_weights(nn.Linear(1, 1), path)
    assert not trace.exists()
    if how != "bare":  # not written by torch: refused before its content is looked at
        assert "could run code" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_whole_pickled_network_is_refused(tmp_path, donor):
    torch.save(donor, tmp_path / "weights.pth")
    with pytest.raises(ExciteError, match=r"state_dict\(\) alone"):
        load_weights(receiver(), tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(1)], {"state_dict": {}}, {"state_dict": 3}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ExciteError, match="holds no state dict"):
        load_weights(nn.Linear(1, 1), tmp_path / "weights.pth")


# --- the published CIFAR weights -------------------------------------------------------------------------------


def test_the_published_resnet20(shared_data):
    path = shared_data / "resnet20-cifar10-published.th"
    network = create("resnet20", num_classes=10, weights=path)
    tensors = read_weights(path).tensors
    learned = sum(tensor.numel() for name, tensor in tensors.items() if "running" not in name)
    assert cost(network, (3, 32, 32)).parameters == learned == 269_722
    torch.testing.assert_close(network.fc.weight.detach(), tensors["linear.weight"], rtol=0, atol=0)


def test_the_published_resnet20_classifies(shared_data):
    """On 1,000 of the JPEG copies; the whole set gives 81.03 %, so 3.7 points are three standard errors here."""
    network = create("resnet20", num_classes=10, weights=shared_data / "resnet20-cifar10-published.th").eval()
    images, labels = [], []
    with tarfile.open(shared_data / "cifar10-jpeg-test.tar") as archive:
        files = sorted(member.name for member in archive if member.isfile())
        classes = sorted({name.split("/")[-2] for name in files})
        for name in files[::10]:
            images.append(np.asarray(Image.open(io.BytesIO(archive.extractfile(name).read()))))
            labels.append(classes.index(name.split("/")[-2]))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        answers = network((x - mean[:, None, None]) / std[:, None, None]).argmax(1)
    assert float((answers == torch.tensor(labels)).float().mean()) == pytest.approx(0.8103, abs=0.037)
