"""Integrations with other libraries. Each is imported only when it is used.

- `transformers`: a callback for ``transformers.Trainer``, and ``save_pretrained``.
- `lightning`: a callback for Lightning's ``Trainer``.
- `trackers`: TensorBoard's, W&B's, MLflow's and Lightning's writers, for ``pruner.track``.
- `peft`: LoRA adapters that leave zeros as they are.
- `pretrained`: the format of compressed models that ``from_pretrained`` loads; registered by an
  `import_hook`, because ``import mtprune`` does not import transformers.
- `dcp`: a pruner in a checkpoint of ``torch.distributed.checkpoint``.
- `torch_pruning`: the channels of a model, found by torch-pruning.
"""
