"""The model of the checkpoints in this folder: 66 parameters, dropout and batch norm among them."""

import torch


def net(in_shape, classes):
    return torch.nn.Sequential(
        torch.nn.AvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.BatchNorm1d(4),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(4, 4),
        torch.nn.ReLU(),
        torch.nn.Linear(4, classes),
    )
