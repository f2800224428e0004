"""Images in files: NIfTI, MetaImage, DICOM, pictures."""
