"""Networks: SegResMamba, its tri-oriented Mamba (ToM), and the peers that it is compared with."""
