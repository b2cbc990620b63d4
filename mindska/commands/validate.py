"""Evaluates a checkpoint on a validation set: top-1, top-5 and loss over every image exactly once.

    mindska validate --config skanet_s --data_dir DATA --ckpt_path output/skanet_s/skanet_s_best.ckpt
    mpirun -n 8 --bind-to none mindska validate --model skanet_s --data_dir DATA --ckpt_path model_best.pth.tar

A checkpoint of mindska says itself which model it is, of how many classes, and how images are prepared; only the last
may be set otherwise, in the configuration or on the command line. Files of others (PyTorch, safetensors, Caffe) are
recognised by their content; of a file with averaged weights these are taken.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from mindska.config import check_given, parse_args
from mindska.distributed import all_reduce_sum, check_environment, distributed
from mindska.errors import WriteError, clear_errors
from mindska.files import check_writable
from mindska.streams import print_result


def main(arguments: Optional[Sequence[str]] = None, description: Optional[str] = __doc__) -> None:
    config = parse_args(arguments, description or "", command="validate")
    with clear_errors():
        check_given(config, "ckpt_path")
        check_environment()
        if config.result_json:
            check_writable(Path(config.result_json))

    # Only now, since they load MindSpore, which takes seconds.
    from mindska import builders
    from mindska.data import EvalLoader, EvalTransform, check_same_on_all_ranks, open_dataset
    from mindska.evaluation import EvalStep, evaluate

    with clear_errors(), distributed(builders.device_target(config)) as world, clear_errors():
        builders.set_up(config, world)
        weights = builders.configured_weights(config)
        assert weights is not None  # ckpt_path is given
        record = weights.record
        config = builders.with_recorded_model(config, record)
        options = dict(builders.dataset_options(config), trained_on=record.get("class_names"))
        dataset = open_dataset(config.dataset, config.data_dir, config.val_split, **options)
        check_same_on_all_ranks(dataset)
        builders.check_labels(dataset, training=False)
        num_classes = builders.evaluated_classes(config, record, dataset.class_names)
        pixels = builders.build_preprocessing(config, record.get("preprocessing"))
        share, skip = builders.loader_share(config, world), config.val_skip_damaged
        loader = EvalLoader(dataset, EvalTransform(pixels), config.batch_size, skip_damaged=skip, **share)
        network = builders.build_network(config, num_classes, pixels.in_channels, weights).set_train(False)
        builders.check_image_size(network, pixels)
        result = evaluate(EvalStep(network).set_train(False), loader, all_reduce_sum, config, progress=world.rank == 0)

        if world.rank == 0:
            if config.result_json:
                facts = dict(model=config.model, ckpt_path=config.ckpt_path, world_size=world.size)
                facts.update(preprocessing=dataclasses.asdict(pixels), validation_set=dataset.identity())
                result.write(Path(config.result_json), **facts)
            refused = print_result(f"{config.ckpt_path}: {result}")
            if refused and not config.result_json:
                raise WriteError(f"standard output cannot be written ({refused}); the result is {result}")
