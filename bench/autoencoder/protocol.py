"""What an experiment holds fixed for every optimiser: the network, the images, the epochs, the schedule."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "PROTOCOLS", "REDUCED", "TINY", "Protocol"]


@dataclass(frozen=True)
class Protocol:
    """The part of an experiment that all optimisers share.

    Attributes:
        name: key of the chosen hyper-parameters.
        encoder: widths from the image to the code; the decoder mirrors them.
        images: train images to take, ``None`` for all; the first ones of a file.
        test_images: likewise.
        batch_size: images a step.
        epochs: passes over the train images.
        search_epochs: passes of a trial of the search.
        warm_up: epochs in which the learning rate rises to its value; it falls to zero over the others.
        seeds: how many seeds are reported, unless the command line says otherwise.
        interval: steps between two updates of the preconditioners of Shampoo and SOAP.
        momentum: of the local RMSProp, which forgets after ``1 / (1 - momentum)`` local steps; shorter runs need less.
        longer: times as many epochs for the comparison at equal time.
        ablation_epochs: of an ablation's run.
        beyond_seconds: training time of the convnet and of the GPT.
    """

    name: str
    encoder: tuple[int, ...]
    images: int | None
    test_images: int | None
    batch_size: int
    epochs: int
    search_epochs: int
    warm_up: int
    seeds: int
    interval: int
    momentum: float
    longer: int
    ablation_epochs: int
    beyond_seconds: float


#: The paper's, sized for a GPU.
FULL = Protocol(
    name="full",
    encoder=(784, 1000, 500, 250, 30),
    images=None,
    test_images=None,
    batch_size=1000,
    epochs=100,
    search_epochs=50,
    warm_up=5,
    seeds=3,
    interval=20,
    momentum=0.999,
    longer=4,
    ablation_epochs=20,
    beyond_seconds=60.0,
)
#: A smaller network of the same depth, 300 steps: minutes on two cores.
REDUCED = Protocol(
    name="reduced",
    encoder=(784, 128, 64, 32, 16),
    images=3000,
    test_images=2000,
    batch_size=100,
    epochs=10,
    search_epochs=10,
    warm_up=1,
    seeds=2,
    interval=20,
    momentum=0.99,
    longer=10,
    ablation_epochs=4,
    beyond_seconds=2.0,
)
#: Seconds: what the tests run.
TINY = Protocol(
    name="tiny",
    encoder=(784, 16, 8, 4),
    images=60,
    test_images=20,
    batch_size=20,
    epochs=3,
    search_epochs=2,
    warm_up=1,
    seeds=1,
    interval=2,
    momentum=0.9,
    longer=2,
    ablation_epochs=1,
    beyond_seconds=0.2,
)
PROTOCOLS = {protocol.name: protocol for protocol in (FULL, REDUCED, TINY)}
