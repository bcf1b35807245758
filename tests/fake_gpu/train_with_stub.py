"""tests.distributed.train_many with the stand-in for Transformer Engine, and with what else only GPU machines use."""

from moelpr.model.megatron import cpu
from tests.fake_gpu import transformer_engine_stub

transformer_engine_stub.install()  # before Megatron is imported
for name in ("transformer_impl", "num_workers"):
    del cpu.CPU_ARGUMENTS[name]

if __name__ == "__main__":
    from tests.distributed.train_many import main

    main()
