"""A step of RetinaNet on each rank's own images, and on all of them in one process: loss and norm of each, printed."""

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "parity")]


def main() -> None:
    from mindska.distributed import distributed

    with distributed("CPU") as world:
        import mindspore as ms
        import numpy as np
        from mindspore import Tensor, nn
        from test_detector_networks import batch

        from mindska import create_detector
        from mindska.training.step import StepOptions, TrainStep

        ms.set_context(mode=ms.GRAPH_MODE)
        net, rng = (
            create_detector("retinanet", "sk_resnet18", num_classes=3, drop_path_rate=0.0),
            np.random.default_rng(0),
        )
        for p in net.get_parameters():
            around = p.name.endswith(("gamma", "variance"))
            p.set_data(Tensor((rng.standard_normal(p.shape) * 0.02 + around).astype(np.float32)))

        def of_rank(rank):
            images, boxes, labels, shapes, _, noise = batch((64, 64), net.noise_size, seed=rank)
            labels[0, 1:] = np.where(rank, -1, labels[0, 1:])  # another number of positives
            return images, boxes, labels, shapes, noise

        def step(arrays, ranks):
            network = TrainStep(net, None, nn.SGD(net.trainable_params(), 0.0), StepOptions(), ranks)
            network.set_train()
            for _, cell in net.cells_and_names():
                if isinstance(cell, nn.BatchNorm2d):
                    cell.set_train(False)
            return [float(x.asnumpy()) for x in network(*map(Tensor, arrays))]

        print("rank", *step(of_rank(world.rank), world.size), flush=True)
        if world.rank == 0:
            print("whole", *step([np.concatenate(pair) for pair in zip(of_rank(0), of_rank(1))], 1), flush=True)


if __name__ == "__main__":
    main()
