//! Writes the CRDs to `crds/yaml/` and into the Helm chart, and the API reference to `docs/api.md`.

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
    fs::write(root.join("docs/api.md"), tunesmith_crds::reference::markdown())?;
    Ok(())
}
