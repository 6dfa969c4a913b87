//! Finds the sites in the module's source.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use proc_macro2::TokenStream;
use proc_macro2::TokenTree;
use syn::Expr;
use syn::spanned::Spanned;
use syn::visit;
use syn::visit::Visit;

use crate::COPE_WITHOUT;
use crate::NEED_MEMORY;

/// Where the module's source has no code of the module itself.
const OTHER_FOLDERS: [&str; 5] = ["bench", "build", "docs", "tests", "tests-kunit"];

/// A call that allocates.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Site {
    /// The file, from the top of the source.
    pub file: String,
    /// The first line of the call.
    pub first: usize,
    /// The last one.
    pub last: usize,
    /// What is called.
    pub what: String,
    /// The call fails for want of memory.
    pub must_fail: bool,
}

impl Site {
    /// Whether a line of a file is in the call.
    pub fn contains(&self, file: &str, line: usize) -> bool {
        self.file == file && (self.first..=self.last).contains(&line)
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} {}", self.file, self.first, self.what)
    }
}

/// All sites, in order.
pub fn sites(top: &Path) -> Result<Vec<Site>> {
    let mut files = Vec::new();
    for path in rust_files(top, true)? {
        let text = fs::read_to_string(&path)?;
        let file = syn::parse_file(&text).with_context(|| path.display().to_string())?;
        let name = path.strip_prefix(top)?.display().to_string();
        files.push((name, file));
    }
    let mut names = Names::default();
    for (_, file) in &files {
        names.visit_file(file);
    }
    let mut sites = BTreeSet::new();
    for (name, file) in &files {
        let mut calls = Calls {
            names: &names,
            file: name,
            owner: None,
            sites: Vec::new(),
            hidden: None,
        };
        calls.visit_file(file);
        ensure!(
            calls.hidden.is_none(),
            "{name}:{}: flags inside of a macro, where this program does not see what is called",
            calls.hidden.unwrap_or_default()
        );
        for site in calls.sites {
            let (line, new) = (site.first, sites.insert(site));
            ensure!(new, "{name}:{line}: two calls that cannot be told apart");
        }
    }
    ensure!(!sites.is_empty(), "no module in {}", top.display());
    Ok(sites.into_iter().collect())
}

fn rust_files(dir: &Path, is_top: bool) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let other = name.starts_with('.') || (is_top && OTHER_FOLDERS.contains(&name.as_str()));
        if entry.file_type()?.is_dir() && !other {
            files.extend(rust_files(&entry.path(), false)?);
        } else if name.ends_with(".rs") {
            files.push(entry.path());
        }
    }
    Ok(files)
}

/// What stands for flags, and which functions of our own take some.
#[derive(Default)]
struct Names {
    flags: BTreeSet<String>,
    functions: BTreeSet<(String, String)>,
    methods: BTreeSet<String>,
    owner: Option<String>,
}

impl Names {
    fn function(&mut self, signature: &syn::Signature) {
        let name = signature.ident.to_string();
        if let syn::ReturnType::Type(_, kind) = &signature.output
            && is_flags(kind)
        {
            self.flags.insert(name.clone());
        }
        let mut takes_flags = false;
        for input in &signature.inputs {
            if let syn::FnArg::Typed(argument) = input
                && is_flags(&argument.ty)
            {
                takes_flags = true;
                if let syn::Pat::Ident(pattern) = &*argument.pat {
                    self.flags.insert(pattern.ident.to_string());
                }
            }
        }
        if takes_flags {
            if signature.receiver().is_some() {
                self.methods.insert(name.clone());
            }
            let owner = self.owner.clone().unwrap_or_default();
            self.functions.insert((owner, name));
        }
    }
}

impl<'a> Visit<'a> for Names {
    fn visit_item_const(&mut self, item: &'a syn::ItemConst) {
        if is_flags(&item.ty) {
            self.flags.insert(item.ident.to_string());
        }
    }

    fn visit_item_impl(&mut self, item: &'a syn::ItemImpl) {
        self.owner = last_name(&item.self_ty);
        visit::visit_item_impl(self, item);
        self.owner = None;
    }

    fn visit_item_trait(&mut self, item: &'a syn::ItemTrait) {
        self.owner = Some(item.ident.to_string());
        visit::visit_item_trait(self, item);
        self.owner = None;
    }

    fn visit_signature(&mut self, signature: &'a syn::Signature) {
        self.function(signature);
    }
}

fn last_name(kind: &syn::Type) -> Option<String> {
    let syn::Type::Path(path) = kind else {
        return None;
    };
    Some(path.path.segments.last()?.ident.to_string())
}

fn is_flags(kind: &syn::Type) -> bool {
    last_name(kind).as_deref() == Some("Flags")
}

/// Finds the sites of one file.
struct Calls<'a> {
    names: &'a Names,
    file: &'a str,
    owner: Option<String>,
    sites: Vec<Site>,
    /// A line with a macro that flags are used in.
    hidden: Option<usize>,
}

impl Calls<'_> {
    fn is_flag(&self, name: &str) -> bool {
        name.starts_with("GFP_") || name.starts_with("__GFP_") || self.names.flags.contains(name)
    }

    /// Whether an expression is flags, not something that has some in it.
    fn are_flags(&self, expression: &Expr) -> bool {
        match expression {
            Expr::Path(path) => {
                let last = path.path.segments.last();
                last.is_some_and(|segment| self.is_flag(&segment.ident.to_string()))
            }
            Expr::Call(call) => self.are_flags(&call.func),
            Expr::Binary(binary) => self.are_flags(&binary.left) || self.are_flags(&binary.right),
            Expr::Paren(inner) => self.are_flags(&inner.expr),
            _ => false,
        }
    }

    fn add(&mut self, call: &impl Spanned, what: String, must_fail: bool) {
        let span = call.span();
        self.sites.push(Site {
            file: self.file.to_owned(),
            first: span.start().line,
            last: span.end().line,
            what,
            must_fail,
        });
    }

    fn mentions_flags(&self, tokens: TokenStream) -> bool {
        tokens.into_iter().any(|token| match token {
            TokenTree::Group(group) => self.mentions_flags(group.stream()),
            TokenTree::Ident(name) => self.is_flag(&name.to_string()),
            _ => false,
        })
    }
}

impl<'a> Visit<'a> for Calls<'_> {
    fn visit_item_impl(&mut self, item: &'a syn::ItemImpl) {
        self.owner = last_name(&item.self_ty);
        visit::visit_item_impl(self, item);
        self.owner = None;
    }

    fn visit_expr_call(&mut self, call: &'a syn::ExprCall) {
        if let Expr::Path(path) = &*call.func {
            let mut names = path.path.segments.iter().rev();
            let name = names.next().map(|segment| segment.ident.to_string());
            let name = name.unwrap_or_default();
            let of = names.next().map(|segment| segment.ident.to_string());
            if of.as_deref() == Some("bindings") {
                let needs = NEED_MEMORY.contains(&name.as_str());
                if needs || COPE_WITHOUT.contains(&name.as_str()) {
                    self.add(call, name.clone(), needs);
                }
            }
            if call.args.iter().any(|argument| self.are_flags(argument)) {
                let of = match of.as_deref() {
                    Some("Self") => self.owner.clone(),
                    _ => of,
                };
                let of = of.unwrap_or_default();
                let key = (of.clone(), name.clone());
                if !self.names.functions.contains(&key) {
                    self.add(call, format!("{of}::{name}"), true);
                }
            }
        }
        visit::visit_expr_call(self, call);
    }

    fn visit_expr_method_call(&mut self, call: &'a syn::ExprMethodCall) {
        let name = call.method.to_string();
        if call.args.iter().any(|argument| self.are_flags(argument))
            && !self.names.methods.contains(&name)
        {
            self.add(call, format!(".{name}"), true);
        }
        visit::visit_expr_method_call(self, call);
    }

    fn visit_macro(&mut self, called: &'a syn::Macro) {
        if self.mentions_flags(called.tokens.clone()) {
            self.hidden = Some(called.span().start().line);
        }
    }
}
