"""The three YAML blocks of the user's guide, word for word."""

VIDEO = """\
dataset:
  dataset_type: "video"
  data_path: "/path/to/video/data"
  image_size: [512, 512]
  video_clip_length: 5
  batch_size: 1
  num_workers: 16
  shuffle: True
  prompt_types: ["point"]
  num_of_pos_points: 1
  include_center_point: True
"""
COCO = """\
dataset:
  dataset_type: "coco"
  data_path: "/path/to/coco_annotations.json"
  image_size: [512, 512]
  video_clip_length: 5
  batch_size: 1
  num_workers: 16
  shuffle: True
  prompt_types: ["point", "bbox"]
  num_of_pos_points: 1
  include_center_point: True
"""
MODEL = """\
model:
  checkpoint_path: "/path/to/sam2_checkpoint.pt"
  config_path: "configs/sam2.1_hiera_t.yaml"
  trainable_modules: ["memory_attention", "memory_encoder"]
  image_size: 512
  num_maskmem: 7
"""
