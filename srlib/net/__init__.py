"""Networks: SegResMamba, its tri-oriented Mamba (ToM), the peers that it is compared with, and what they cost."""
