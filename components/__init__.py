"""The stages as container components of Kubeflow Pipelines: typed inputs and outputs, image, resources. No ML code."""
