"""The method and its networks.

    architectures  the networks, and the cut after block n
    lirf           the deposit: T and T_r, which start from T0, and the losses that train them
    losses         one function per equation
    synthesis      images that are neither of D_r nor preserved, for the deep deposit
    pruning        the deposit module T_r: a pruned copy of the original's lower part
    difference     what T has lost as a rounded difference of weights
    bank           deposits that are away from T, and T0 rebuilt
    recover        merge rules and the recover network T~
    checkpoints    networks from and to checkpoint files
    weights        networks that others trained
"""
