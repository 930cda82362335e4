//! What the code of one module names of others.

use std::collections::BTreeMap;

use proc_macro2::{Delimiter, Span, TokenStream, TokenTree};
use syn::{
    Attribute, Expr, ExprCall, ExprPath, ImplItem, Item, ItemMod, ItemUse, Macro, Meta, Path, Stmt, Token, TraitItem,
    UseTree, Visibility,
    parse::Parser,
    punctuated::Punctuated,
    visit::{self, Visit},
};

/// A path in the code, and the line that it starts on.
#[derive(Clone, Debug, PartialEq)]
pub struct Import {
    pub path: Vec<String>,
    pub line: usize,
}

/// All that the code of a module names, its child modules left out.
#[derive(Debug, Default)]
pub struct Imports {
    /// Names that a `use` brings in, with the path of each.
    pub bindings: BTreeMap<String, Vec<String>>,
    /// Paths of `use …::*`.
    pub globs: Vec<Vec<String>>,
    pub imports: Vec<Import>,
}

impl Imports {
    pub fn of(items: &[Item]) -> Self {
        let mut imports = Self::default();
        for item in items {
            imports.visit_item(item);
        }
        imports
    }

    fn add(&mut self, path: Vec<String>, span: Span) {
        self.imports.push(Import { path, line: span.start().line });
    }

    fn add_path(&mut self, path: &Path) {
        if path.leading_colon.is_none()
            && let Some(first) = path.segments.first()
        {
            let names = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.add(names, first.ident.span());
        }
    }

    fn add_use(&mut self, tree: &UseTree, prefix: &[String], private: bool) {
        let with = |name: String| [prefix, &[name]].concat();
        match tree {
            UseTree::Path(path) => self.add_use(&path.tree, &with(path.ident.to_string()), private),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_use(tree, prefix, private)),
            UseTree::Name(name) if name.ident == "self" => {
                self.bind(prefix.last().cloned().unwrap_or_default(), prefix.to_vec(), name.ident.span(), private);
            }
            UseTree::Name(name) => {
                self.bind(name.ident.to_string(), with(name.ident.to_string()), name.ident.span(), private);
            }
            UseTree::Rename(rename) => {
                let path = if rename.ident == "self" { prefix.to_vec() } else { with(rename.ident.to_string()) };
                self.bind(rename.rename.to_string(), path, rename.ident.span(), private);
            }
            UseTree::Glob(glob) => {
                self.globs.push(prefix.to_vec());
                if private {
                    self.add(prefix.to_vec(), glob.star_token.spans[0]);
                }
            }
        }
    }

    fn bind(&mut self, name: String, path: Vec<String>, span: Span, private: bool) {
        if private {
            self.add(path.clone(), span);
        }
        self.bindings.entry(name).or_insert(path);
    }

    /// The paths among tokens that no parser has read: `a::b`, `Name`, `function(…)`.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Group(group) => self.add_tokens(group.stream()),
                TokenTree::Ident(first) => {
                    let follows_dot = at > 0 && is_punct(tokens.get(at - 1), '.') && !is_punct(tokens.get(at - 2), '.');
                    let mut path = vec![first.to_string()];
                    while is_punct(tokens.get(at + 1), ':')
                        && is_punct(tokens.get(at + 2), ':')
                        && let Some(TokenTree::Ident(next)) = tokens.get(at + 3)
                    {
                        path.push(next.to_string());
                        at += 3;
                    }
                    let called = matches!(tokens.get(at + 1),
                        Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Parenthesis);
                    if !follows_dot && (path.len() > 1 || called || is_type(&path[0])) {
                        self.add(path, first.span());
                    }
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// The paths in strings, such as `#[serde(default = "crate::defaults::seed")]`.
    fn add_strings(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => self.add_strings(group.stream()),
                TokenTree::Literal(literal) => {
                    let text = literal.to_string();
                    if let Some(path) = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'))
                        && path.contains("::")
                        && let Ok(path) = syn::parse_str::<Path>(path)
                    {
                        let names = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
                        self.add(names, literal.span());
                    }
                }
                _ => {}
            }
        }
    }
}

impl<'ast> Visit<'ast> for Imports {
    fn visit_item(&mut self, item: &'ast Item) {
        if !item_attributes(item).is_some_and(tests_only) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        let attributes = match item {
            ImplItem::Const(item) => &item.attrs,
            ImplItem::Fn(item) => &item.attrs,
            ImplItem::Type(item) => &item.attrs,
            ImplItem::Macro(item) => &item.attrs,
            _ => return visit::visit_impl_item(self, item),
        };
        if !tests_only(attributes) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_trait_item(&mut self, item: &'ast TraitItem) {
        if !matches!(item, TraitItem::Fn(function) if tests_only(&function.attrs)) {
            visit::visit_trait_item(self, item);
        }
    }

    fn visit_stmt(&mut self, statement: &'ast Stmt) {
        if !matches!(statement, Stmt::Local(local) if tests_only(&local.attrs)) {
            visit::visit_stmt(self, statement);
        }
    }

    fn visit_variant(&mut self, variant: &'ast syn::Variant) {
        if !tests_only(&variant.attrs) {
            visit::visit_variant(self, variant);
        }
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        if !tests_only(&field.attrs) {
            visit::visit_field(self, field);
        }
    }

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        if !tests_only(&arm.attrs) {
            visit::visit_arm(self, arm);
        }
    }

    // A child module is a module of its own.
    fn visit_item_mod(&mut self, _: &'ast ItemMod) {}

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if item.leading_colon.is_none() {
            self.add_use(&item.tree, &[], matches!(item.vis, Visibility::Inherited));
        }
    }

    fn visit_path(&mut self, path: &'ast Path) {
        self.add_path(path);
        visit::visit_path(self, path);
    }

    fn visit_expr_call(&mut self, call: &'ast ExprCall) {
        if let Expr::Path(function) = &*call.func {
            self.add_path(&function.path);
        }
        visit::visit_expr_call(self, call);
    }

    // A lone name in lower case is a local variable, if it isn't called.
    fn visit_expr_path(&mut self, expression: &'ast ExprPath) {
        if expression.path.get_ident().is_none_or(|name| is_type(&name.to_string())) {
            visit::visit_expr_path(self, expression);
        }
    }

    fn visit_macro(&mut self, call: &'ast Macro) {
        self.add_path(&call.path);
        self.add_tokens(call.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        self.add_path(attribute.path());
        if let Meta::List(list) = &attribute.meta {
            self.add_tokens(list.tokens.clone());
            self.add_strings(list.tokens.clone());
        }
    }
}

/// Whether an item with these attributes is compiled for tests only.
pub fn tests_only(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("cfg") => list.parse_args::<Meta>().is_ok_and(|it| needs_test(&it)),
        _ => false,
    })
}

/// Whether a `cfg` predicate holds under `test` only: `test`, or `all(…)` of it and more.
fn needs_test(predicate: &Meta) -> bool {
    match predicate {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("all") => Punctuated::<Meta, Token![,]>::parse_terminated
            .parse2(list.tokens.clone())
            .is_ok_and(|all| all.iter().any(needs_test)),
        _ => false,
    }
}

/// The name that an item defines in its module.
pub fn name_of(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::TraitAlias(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(name.to_string())
}

fn item_attributes(item: &Item) -> Option<&[Attribute]> {
    Some(match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => return None,
    })
}

fn is_type(name: &str) -> bool {
    name.starts_with(char::is_uppercase)
}

fn is_punct(token: Option<&TokenTree>, wanted: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == wanted)
}
