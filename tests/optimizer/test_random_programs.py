"""Random programs of what a training loop may do, against a plain model of which rows must be counted.

The model of it: every layer has a gradient or none, and the rows of the passes that this gradient was summed from.
Rows are counted after every rule, and the reports of a step are held against them.
"""

import copy

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from locoprop_torch import LocoProp
from tests.helpers import batch, captured, loss_of, mlp, moved, weights

LAYERS = (0, 2, 4)
ROWS = st.integers(1, 5)


def versions(model):
    return [p._version for p in model.parameters()]


class Programs(RuleBasedStateMachine):
    graphs = Bundle("graphs")
    few: int | None = None

    def __init__(self):
        super().__init__()
        self.model = mlp()
        self.opt = LocoProp(self.model, lr=1e-3, rule="adam", local_iterations=2, rows=self.few)
        self.expected: dict[int, list[int]] = {
            layer: [] for layer in LAYERS
        }  # identities of the passes whose rows are in the gradient
        self.sizes = {}  # rows by pass
        self.used: set[tuple[int, int]] = set()  # layers and passes whose rows were let go of
        self.seed = 0

    def fresh(self, rows):
        self.seed += 1
        self.sizes[self.seed] = rows
        return self.seed

    def add(self, number, layers=LAYERS):
        for layer in layers:
            if isinstance(self.expected[layer], _Discarded):
                self.expected[layer] = []
            if number not in self.expected[layer] and (layer, number) not in self.used:
                self.expected[layer].append(number)

    @rule(target=graphs, rows=ROWS)
    def forward(self, rows):
        number = self.fresh(rows)
        return number, loss_of(self.model, rows, number), self.model, versions(self.model)

    @rule(graph=graphs)
    def backward(self, graph):
        number, loss, model, before = graph
        # Of a copied model it is none of our business; and torch refuses where weights have been written to.
        if model is self.model and versions(model) == before:
            loss.backward(retain_graph=True)
            self.add(number)

    @rule(rows=ROWS)
    def forward_and_backward(self, rows):
        number = self.fresh(rows)
        loss_of(self.model, rows, number).backward()
        self.add(number)

    @rule(rows=ROWS)
    def forward_without_gradients(self, rows):
        with torch.no_grad():
            loss_of(self.model, rows)

    @rule(rows=ROWS, create_graph=st.booleans())
    def saliency(self, rows, create_graph):
        x = batch(rows)[0].requires_grad_()
        torch.autograd.grad(self.model(x).square().sum(), x, create_graph=create_graph)

    @rule(rows=ROWS)
    def gradients_of_parameters(self, rows):
        torch.autograd.grad(loss_of(self.model, rows), list(self.model.parameters()))
        # What was discarded is noticed, as gradients come to the parameters, and may be counted again from now on.
        for layer, numbers in self.expected.items():
            if isinstance(numbers, _Discarded):
                self.expected[layer] = []

    @rule(rows=ROWS, layer=st.sampled_from(LAYERS))
    def backward_into_one_layer(self, rows, layer):
        number = self.fresh(rows)
        loss_of(self.model, rows, number).backward(inputs=list(self.model[layer].parameters()))
        self.add(number, [layer])

    @rule(rows=ROWS)
    def gradient_penalty(self, rows):
        number = self.fresh(rows)
        x = batch(rows, number)[0].requires_grad_()
        (gradient,) = torch.autograd.grad(self.model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        self.add(number)

    @rule(set_to_none=st.booleans(), whose=st.sampled_from(["optimizer", "model"]))
    def zero_grad(self, set_to_none, whose):
        (self.opt if whose == "optimizer" else self.model).zero_grad(set_to_none)
        self.discarded(LAYERS, at_once=whose == "optimizer")

    @rule(layer=st.sampled_from(LAYERS), how=st.sampled_from(["none", "zero_", "zeros"]))
    def discard_one(self, layer, how):
        for p in self.model[layer].parameters():
            if how == "none":
                p.grad = None
            elif how == "zeros":
                p.grad = torch.zeros_like(p)
            elif p.grad is not None:
                p.grad.zero_()
        self.discarded([layer])

    def release(self):
        """Whatever the optimiser still holds goes, and a second backward pass does not bring it back."""
        for layer, numbers in self.expected.items():
            self.used |= {(layer, number) for number in (*numbers, *getattr(numbers, "held", ()))}
        self.expected = {layer: [] for layer in LAYERS}

    def discarded(self, layers, at_once=False):
        # It is noticed when the next gradient comes; a step before that takes the gradient as it is.
        for layer in layers:
            self.expected[layer] = [] if at_once else _Discarded(self.expected[layer])

    @rule(factor=st.sampled_from([0.5, 1.0, 3.0]))
    def scale_gradients(self, factor):
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)

    @rule()
    def step(self):
        before = weights(self.model)
        gradients = [p.grad is not None for p in self.model.parameters()]
        self.opt.step()
        reported = {problem.name: problem for report in self.opt.last_reports for problem in report.problems}
        for layer, numbers in self.expected.items():
            problem = reported[str(layer)]
            if not isinstance(numbers, _Discarded):
                assert problem.rows == sum(self.sizes[number] for number in numbers)
            if self.model[layer].weight.grad is None and self.model[layer].bias.grad is None:
                assert problem.driver == "none"
        for changed, had in zip(moved(self.model, before), gradients, strict=True):
            assert had or not changed
        self.release()
        assert self.opt.skipped_steps == 0

    @precondition(lambda self: any(p.grad is not None for p in self.model.parameters()))
    @rule()
    def skipped_step(self):
        state = copy.deepcopy(self.opt.state_dict()["state"])
        before, grads = weights(self.model), [p.grad for p in self.model.parameters()]
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        next(g for g in grads if g is not None).view(-1)[0] = float("inf")
        scaler.scale(torch.ones(()))
        scaler.step(self.opt)
        scaler.update()
        assert not any(moved(self.model, before))
        assert self.opt.state_dict()["state"].keys() == state.keys()
        self.model.zero_grad()
        self.discarded(LAYERS)

    @rule()
    def save_and_load(self):
        """The rows are dropped: a checkpoint has none."""
        saved = copy.deepcopy(self.opt.state_dict())
        self.opt.load_state_dict(saved)
        self.release()
        self.opt.zero_grad()
        after = self.opt.state_dict()
        assert after["param_groups"] == saved["param_groups"]
        for i, slots in saved["state"].items():
            assert all(torch.equal(after["state"][i][slot], value) for slot, value in slots.items())

    @rule()
    def copy_model_and_optimizer(self):
        self.model.zero_grad()
        self.opt.zero_grad()
        self.expected = {layer: [] for layer in LAYERS}
        model, opt = self.model, self.opt
        self.model, self.opt = copy.deepcopy((model, opt))
        assert not any(moved(self.model, weights(model)))

    @invariant()
    def the_rows_are_those_of_the_gradient(self):
        for layer, numbers in self.expected.items():
            passes = captured(self.opt)[str(layer)]
            if not isinstance(numbers, _Discarded):
                assert sum(p.kept.size if p.kept else len(p.x) for p in passes) == sum(
                    self.sizes[number] for number in numbers
                )


class _Discarded(list):
    """No rows, though the optimiser need not know it yet, and may still hold those of the passes ``held``."""

    def __init__(self, before):
        super().__init__()
        self.held = {*before, *getattr(before, "held", ())}


Programs.TestCase.settings = settings(
    max_examples=200, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_random_programs = Programs.TestCase


class ProgramsWithRows(Programs):
    """Where each local step takes one row or two, nearly every pass is cut down to them."""

    few = 1


ProgramsWithRows.TestCase.settings = settings(Programs.TestCase.settings, max_examples=50)
test_random_programs_with_rows = ProgramsWithRows.TestCase


def test_a_pass_whose_gradient_was_seen_to_be_gone_counts_again():
    """The optimiser had let go of layer 0's pass before the checkpoint was loaded, which uses up what is held then."""
    program = Programs()
    graph = program.forward(rows=1)
    program.backward(graph)
    program.discard_one(layer=0, how="none")
    program.gradients_of_parameters(rows=1)
    program.save_and_load()
    program.backward(graph)
    assert [len(passes) for passes in captured(program.opt).values()] == [1, 0, 0]
    program.the_rows_are_those_of_the_gradient()
    program.step()
