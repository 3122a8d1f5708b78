"""A run stopped after any step goes on as if it had never stopped: every byte of weights and state."""

import copy
import io

import pytest
import torch

import alps_kernels as alps

from .models import assert_same, bytes_of, loss_of, some_heads, tiny

pytestmark = pytest.mark.fault("Resume")
STEPS = 20
PRECISIONS = [
    (torch.float32, "split", torch.float32), (torch.float32, None, torch.bfloat16), (torch.float64, None, torch.float32),
    (torch.bfloat16, "split", torch.float32), (torch.bfloat16, "kahan", torch.float32),
    (torch.bfloat16, "stochastic", torch.bfloat16), (torch.float16, "split", torch.float32), (torch.bfloat16, "split", "8bit"),
]


class Run:
    """A model, an optimizer on some of its heads and a schedule; step i has the data of i."""

    def __init__(self, dtype, master, moments, sliced, seed=0):
        self.model = tiny(dtype=dtype, seed=seed)
        heads = some_heads(self.model)
        bound = alps.slice_heads(self.model, heads) if sliced else heads.freeze(self.model)
        self.optimizer = alps.HeadAdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1, heads=bound, master=master,
                                        moment_dtype=moments, amsgrad=moments == torch.float32, max_grad_norm=1.0)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

    def step(self, i):
        self.optimizer.zero_grad()
        loss_of(self.model, i).backward()
        self.optimizer.step()
        self.schedule.step()

    def everything(self):
        state = self.optimizer.state_dict()["state"]
        return {"weights": bytes_of(self.model),
                "state": {str(i): {k: v.clone() for k, v in entry.items() if isinstance(v, torch.Tensor)}
                          for i, entry in state.items()}}


def torch_save(run, folder):
    file = io.BytesIO()
    torch.save([run.model.state_dict(), run.optimizer.state_dict(), run.schedule.state_dict()], file)
    return file


def torch_load(run, file):
    file.seek(0)
    model, optimizer, schedule = torch.load(file, weights_only=True)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    run.schedule.load_state_dict(schedule)


def safetensors_save(run, folder):
    """Tensors as safetensors, the rest beside them."""
    from safetensors.torch import save

    saved = copy.deepcopy(run.optimizer.state_dict())
    tensors = {f"state.{i}.{key}": value for i, entry in saved["state"].items() for key, value in entry.items()
               if isinstance(value, torch.Tensor)}
    tensors |= {f"model.{name}": value for name, value in run.model.state_dict().items()}
    return save({name: value.contiguous() for name, value in tensors.items()}), saved, run.schedule.state_dict()


def safetensors_load(run, stored):
    from safetensors.torch import load

    data, saved, schedule = stored
    tensors, saved = load(data), copy.deepcopy(saved)
    for i, entry in saved["state"].items():
        entry.update({key: tensors[f"state.{i}.{key}"] for key, value in entry.items() if isinstance(value, torch.Tensor)})
    run.model.load_state_dict({name.removeprefix("model."): v for name, v in tensors.items() if name.startswith("model.")})
    run.optimizer.load_state_dict(saved)
    run.schedule.load_state_dict(schedule)


def dcp_save(run, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(run.model, run.optimizer)
    folder = folder / str(len(list(folder.iterdir())))
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder, no_dist=True)
    return folder, run.schedule.state_dict()


def dcp_load(run, stored):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    folder, schedule = stored
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    run.schedule.load_state_dict(schedule)


ROUTES = {"torch.save": (torch_save, torch_load), "safetensors": (safetensors_save, safetensors_load),
          "DCP": (dcp_save, dcp_load)}


@pytest.mark.filterwarnings("ignore")  # DCP's own, about running without a process group
@pytest.mark.parametrize("sliced", [False, True], ids=["plain", "sliced"])
@pytest.mark.parametrize("route, dtype, master, moments", [
    *[("torch.save", *precision) for precision in PRECISIONS],
    *[(route, *precision) for route in ("safetensors", "DCP") for precision in (PRECISIONS[0], PRECISIONS[3])]], ids=str)
def test_every_step_of_a_run(route, dtype, master, moments, sliced, tmp_path):
    """stopped after each of 20 steps, through torch.save, safetensors and DCP: the next step is bit-equal, one run to the end too"""
    save, load = ROUTES[route]
    whole = Run(dtype, master, moments, sliced)
    stored, then = [], []
    for i in range(STEPS):
        if i:
            stored.append((i, save(whole, tmp_path)))
        whole.step(i)
        then.append(whole.everything())
    for i, file in stored:
        again = Run(dtype, master, moments, sliced, seed=99)
        load(again, file)
        for j in range(i, STEPS if i == 10 else i + 1):
            again.step(j)
            assert_same(again.everything(), then[j])


@pytest.mark.parametrize("first, second", [(False, True), (True, False)], ids=["plain to sliced", "sliced to plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_between_plain_and_sliced(dtype, first, second):
    """weights saved from a plain model go into a sliced one and back: the same bytes"""
    one, two = Run(dtype, "split", torch.float32, first), Run(dtype, "split", torch.float32, second, seed=9)
    for i in range(3):
        one.step(i)
    two.model.load_state_dict(one.model.state_dict())
    assert_same(bytes_of(two.model), bytes_of(one.model))


def other_heads(run):
    return alps.HeadAdamW(run.model.parameters(), heads=some_heads(run.model, 8).bind(run.model))


@pytest.mark.parametrize("make, message", [
    (lambda: Run(torch.float32, "split", torch.bfloat16, False).optimizer, "moment_dtype"),
    (lambda: other_heads(Run(torch.float32, "split", torch.float32, False)), "ranges .* there|trained there|trains here"),
    (lambda: Run(torch.bfloat16, "split", torch.float32, False).optimizer, "master None there, 'split' here"),
    (lambda: Run(torch.float32, "split", torch.float32, True).optimizer, "number of|size|trained there|shape|doesn't match"),
    (lambda: torch_gpt2(), "number of|size|doesn't match|shape"),
], ids=["other moments", "other heads", "other dtype", "sliced", "another model"])
def test_state_that_does_not_fit(make, message):
    """state of other heads, moments, dtype, slicing or model: refused with the difference, nothing changed"""
    run = Run(torch.float32, "split", torch.float32, False)
    for i in range(2):
        run.step(i)
    other = make()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(run.optimizer.state_dict())
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["alps"] == before["alps"]


def torch_gpt2():
    model = tiny("gpt2")
    return alps.HeadAdamW(model.parameters(), heads=some_heads(model).freeze(model))
