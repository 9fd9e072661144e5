"""The networks: ResNets cut into lower and upper part, the pruned deposit module, the recover network.

    resnet   architectures, and the cut after block n
    deposit  the deposit module T_r: a pruned copy of the original's lower part
    recover  merge rules and the recover network
    files    networks from and to checkpoint files
"""

from models.deposit import build_deposit_module, cost, refit
from models.files import load_network
from models.recover import MERGE_RULES, Calibration, RecoverNetwork
from models.resnet import ARCHITECTURES, build_network, split_network

__all__ = ["ARCHITECTURES", "MERGE_RULES", "Calibration", "RecoverNetwork", "build_deposit_module", "build_network",
           "cost", "load_network", "refit", "split_network"]
