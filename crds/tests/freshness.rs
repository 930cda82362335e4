//! The committed YAML and the API reference are what the types say.

use std::{fs, path::Path};

#[test]
fn the_generated_yaml_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (name, yaml) in tunesmith_crds::manifests::crds().unwrap() {
        for folder in ["crds/yaml", "charts/tunesmith/files/crds"] {
            let committed = fs::read_to_string(root.join(folder).join(&name)).unwrap_or_default();
            assert!(committed == yaml, "{folder}/{name} is stale: run `make generate`");
        }
    }
}

#[test]
fn the_api_reference_is_current() {
    let committed =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md")).unwrap_or_default();
    assert!(committed == tunesmith_crds::reference::markdown(), "docs/api.md is stale: run `make generate`");
}
