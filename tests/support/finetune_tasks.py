"""Files of a small task, as the fine-tuning harness reads them."""

import gzip


def write_task(folder, name, rows):
    """Writes train and dev of a task of pairs, compressed and not, with the same rows."""
    (folder / name).mkdir(parents=True)
    for split in ("train", "dev"):
        text = "\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n"
        (folder / name / f"{split}.tsv").write_text(text)
        data_file = folder / name / f"{split}.tsv.gz"
        with gzip.open(data_file, "wt", encoding="utf-8") as file:
            file.write(text)
