"""Object detection and instance segmentation: what of it is NumPy stands here, and loads no MindSpore.

anchors, coder, assign, nms, postprocess, roi_align: from maps to boxes and from boxes to targets, in float32 as the
originals (MMDetection's RetinaNet and Mask R-CNN, cvnets' SSDLite). coco (with coco_file and rle), masks, transforms,
metrics: data in COCO's format, what is done to an image, and the evaluation by pycocotools. check, pictures: a data set
looked through before training, detections drawn on an image.

Boxes are x1, y1, x2, y2 in pixels, x2 and y2 exclusive (a box has the width x2 - x1), unless a name says otherwise.
"""
