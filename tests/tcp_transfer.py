"""vLLM's weight transfer with the broadcasts of NCCL, which a CPU has not, replaced by messages over TCP; all else is vLLM's
own: the worker's three calls, the order and shapes it is told, its loader. Imported in the engine's worker."""
import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from weight_sync import NCCLSync, WeightReceiver

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TCPSync(NCCLSync):
    def join(self, meeting):
        self.store = torch.distributed.TCPStore(meeting["master_address"], meeting["master_port"], 2, is_master=True)
        self.count = 0
        return self.put

    def put(self, tensor):
        self.count += 1
        self.store.set(str(self.count), tensor.contiguous().view(torch.uint8).numpy().tobytes())


class TCPTransfer(NCCLWeightTransferEngine):
    def init_transfer_engine(self, about):
        assert (about.rank_offset, about.world_size, about.packed) == (1, 2, False)
        self.store, self.count = torch.distributed.TCPStore(about.master_address, about.master_port, 2, is_master=False), 0

    def receive_weights(self, about):
        for name, dtype, shape in zip(about.names, about.dtype_names, about.shapes, strict=True):
            self.count += 1
            data = bytearray(self.store.get(str(self.count)))
            self.model.load_weights([(name, torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape))])

    def shutdown(self):
        pass


class Receiver(WeightReceiver):
    """The worker's extension: what brings this file into its process."""


WeightTransferEngineFactory.register_engine("tcp", TCPTransfer)
