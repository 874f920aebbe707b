"""The shortest possible use: a NumPy function runs in worker processes while Keras trains and shows its progress."""

import keras
import numpy as np

import keras_mp

images = np.random.default_rng(0).integers(0, 256, (512, 32, 32, 3), dtype=np.uint8)


def preprocess(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Runs in a worker: a random flip, scaling to 0..1, and the target, here the mean brightness."""
    flipped = image[:, ::-1] if rng.random() < 0.5 else image
    return flipped.astype(np.float32) / 255, image.mean() / 255


def main() -> None:
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    with keras_mp.PoolDataset(images, preprocess, batch_size=32, shuffle=True, seed=0) as train:
        model.fit(train, epochs=2)
        model.fit(train.to_tf_dataset(), epochs=2)


if __name__ == "__main__":
    main()
