//! Writes the CRDs to `crds/yaml/` and into the Helm chart.

use std::{fs, path::Path};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for folder in ["crds/yaml", "charts/tunesmith/files/crds"] {
        let folder = root.join(folder);
        fs::create_dir_all(&folder)?;
        for (name, yaml) in tunesmith_crds::manifests::crds()? {
            fs::write(folder.join(name), yaml)?;
        }
    }
    Ok(())
}
