"""Outlines, smooth paths, soft-edged fills and turned pictures: what drawn objects are made of."""

from __future__ import annotations

import cv2
import numpy as np

SUPERSAMPLE = 4  # outlines are filled on a grid this much finer, which gives the soft edge


def outline(rng: np.random.Generator) -> np.ndarray:
    """(K, 2) closed outline about the origin, largest distance 1: one of six shape families."""
    theta = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = np.ones_like(theta)
    family = rng.integers(6)
    if family == 0:  # a blob
        for order in range(2, 6):
            radius += rng.uniform(0.0, 0.5 / order) * np.cos(order * theta + rng.uniform(0, 6.3))
    elif family == 1:  # a star
        arms, depth = rng.integers(3, 7), rng.uniform(0.15, 0.4)
        radius += depth * np.cos(arms * theta)
    elif family == 2:  # a polygon; the running mean rounds its corners
        sides = rng.integers(3, 7)
        radius = 1 / np.cos(theta % (2 * np.pi / sides) - np.pi / sides)
        radius = (radius + np.roll(radius, 1) + np.roll(radius, -1)) / 3
    elif family == 3:  # a bean: a disc with one deep dent
        radius -= rng.uniform(0.35, 0.7) * np.exp(-(((theta - np.pi) / 0.6) ** 2))
    if family == 4:  # a thick arc, from a C to a horseshoe
        gap, inner = rng.uniform(0.5, 1.3), rng.uniform(0.4, 0.6)
        arc = np.linspace(gap, 2 * np.pi - gap, 36)
        theta, radius = np.r_[arc, arc[::-1]], np.r_[np.ones(36), np.full(36, inner)]
    points = radius[:, None] * np.stack([np.cos(theta), np.sin(theta)], 1)
    points[:, 1] *= rng.uniform(0.55, 1.0) if family in (2, 5) else rng.uniform(0.85, 1.0)
    points -= points.mean(0)
    return points / np.linalg.norm(points, axis=1).max()


def sway(rng: np.random.Generator, num_frames: int, max_speed: float) -> np.ndarray:
    """(T, 2) smooth path around (0, 0) that never moves more than max_speed a frame."""
    heading = rng.uniform(0, 2 * np.pi)
    speed = max_speed * rng.uniform(0.4, 1.0) * np.array([np.cos(heading), np.sin(heading)])
    omega = 2 * np.pi / rng.uniform(22, 48, 2)  # one swing takes 22 to 48 frames
    return speed / omega * np.sin(np.arange(num_frames)[:, None] * omega + rng.uniform(0, 6.3, 2))


def coverage(
    points: np.ndarray, radius: float, angle: float, centre: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """(H, W) float32: the share of each pixel, 0..1, that a scaled and turned outline covers.

    Args:
        points: (K, 2) outline about the origin, (x, y).
        radius: px, what a distance of 1 becomes.
        angle: radians, from x towards y.
        centre: (2,) px, (x, y), where the origin comes to lie.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    points = points @ np.array([[cos, sin], [-sin, cos]]) * radius
    points = (points + centre) * SUPERSAMPLE
    fine = np.zeros((size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE), np.uint8)
    cv2.fillPoly(fine, [np.round(points).astype(np.int32)], 255)
    return cv2.resize(fine, size[::-1], interpolation=cv2.INTER_AREA) / np.float32(255)


def view(
    picture: np.ndarray, scale: float, angle: float, target: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """(H, W, 3): the square picture scaled, turned, its middle put at target, (x, y) px."""
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    matrix = np.array([[cos, -sin, 0.0], [sin, cos, 0.0]])
    matrix[:, 2] = target - matrix[:, :2] @ np.full(2, len(picture) / 2)
    return cv2.warpAffine(picture, matrix, size[::-1], borderMode=cv2.BORDER_REFLECT_101)
