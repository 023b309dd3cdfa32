package safepath

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

const app, stranger = 4711, 4712

// tree makes directories and links below a directory that is open to others.
type tree struct {
	t    *testing.T
	base string
}

func newTree(t *testing.T) *tree {
	base := t.TempDir()
	for p := base; p != filepath.Clean(os.TempDir()); p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return &tree{t, base}
}

func (r *tree) at(path string) string { return filepath.Join(r.base, path) }

// give makes uid the owner. Who runs the test keeps his group, whose number may be another.
func (r *tree) give(path string, uid int) error {
	gid := uid
	if uid == os.Geteuid() {
		gid = -1
	}
	return os.Lchown(r.at(path), uid, gid)
}

func (r *tree) dir(path string, uid int, mode uint32) *tree {
	r.t.Helper()
	if err := errors.Join(os.Mkdir(r.at(path), 0o700), syscall.Chmod(r.at(path), mode), r.give(path, uid)); err != nil {
		r.t.Fatal(err)
	}
	return r
}

func (r *tree) link(path, to string, uid int) *tree {
	r.t.Helper()
	if err := errors.Join(os.Symlink(to, r.at(path)), r.give(path, uid)); err != nil {
		r.t.Fatal(err)
	}
	return r
}

func (r *tree) file(path string, uid int, mode os.FileMode) *tree {
	r.t.Helper()
	if err := errors.Join(os.WriteFile(r.at(path), []byte(path), 0o600), os.Chmod(r.at(path), mode), r.give(path, uid)); err != nil {
		r.t.Fatal(err)
	}
	return r
}

// Only root and the user who is named can replace a component of a path that is opened.
func TestNoOtherUserRedirectsAPath(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make directories of several users")
	}
	for name, test := range map[string]struct {
		make  func(r *tree)
		path  string
		users []int
		says  string // part of the refusal; empty: it opens
	}{
		"root's":                {func(r *tree) { r.dir("a", 0, 0o755).dir("a/b", 0, 0o755) }, "a/b", nil, ""},
		"the user's, named":     {func(r *tree) { r.dir("a", app, 0o755).dir("a/b", app, 0o755) }, "a/b", []int{app}, ""},
		"the user's, not named": {func(r *tree) { r.dir("a", app, 0o755).dir("a/b", app, 0o755) }, "a/b", nil, "a belongs to uid 4711"},
		"another user's above":  {func(r *tree) { r.dir("a", stranger, 0o755).dir("a/b", app, 0o755) }, "a/b", []int{app}, "a belongs to uid 4712"},
		"another user's last":   {func(r *tree) { r.dir("a", 0, 0o755).dir("a/b", stranger, 0o755) }, "a/b", []int{app}, "a/b belongs to uid 4712"},
		"a group writes":        {func(r *tree) { r.dir("a", 0, 0o775).dir("a/b", 0, 0o755) }, "a/b", nil, "mode 0775"},
		"all write":             {func(r *tree) { r.dir("a", 0, 0o757).dir("a/b", 0, 0o755) }, "a/b", nil, "mode 0757"},
		"a group writes where nobody else can enter":      {func(r *tree) { r.dir("a", app, 0o700).dir("a/b", app, 0o775) }, "a/b", []int{app}, ""},
		"a group writes the closed directory's neighbour": {func(r *tree) { r.dir("a", app, 0o710).dir("a/b", app, 0o775) }, "a/b", []int{app}, "mode 0775"},
		"through sticky":         {func(r *tree) { r.dir("tmp", 0, 0o1777).dir("tmp/b", app, 0o755) }, "tmp/b", []int{app}, ""},
		"a stranger's in sticky": {func(r *tree) { r.dir("tmp", 0, 0o1777).dir("tmp/b", stranger, 0o755) }, "tmp/b", []int{app}, "tmp/b belongs to uid 4712"},
		"sticky itself":          {func(r *tree) { r.dir("tmp", 0, 0o1777) }, "tmp", nil, "every user can create files in"},

		"root's link":           {func(r *tree) { r.dir("run", 0, 0o755).dir("run/b", 0, 0o755).link("var", "run", 0) }, "var/b", nil, ""},
		"root's link, absolute": {func(r *tree) { r.dir("run", 0, 0o755).dir("run/b", 0, 0o755).link("var", r.at("run"), 0) }, "var/b", nil, ""},
		"root's link, upwards": {func(r *tree) {
			r.dir("run", 0, 0o755).dir("run/b", 0, 0o755).dir("c", 0, 0o755).link("c/var", "../run", 0)
		}, "c/var/b", nil, ""},
		"root's link to what is not safe":     {func(r *tree) { r.dir("run", stranger, 0o755).dir("run/b", app, 0o755).link("var", "run", 0) }, "var/b", []int{app}, "run belongs to uid 4712"},
		"the user's link":                     {func(r *tree) { r.dir("home", app, 0o755).dir("etc", 0, 0o755).link("home/tls", r.at("etc"), app) }, "home/tls", []int{app}, "home/tls is a symbolic link"},
		"root's link in the user's directory": {func(r *tree) { r.dir("home", app, 0o755).dir("etc", 0, 0o755).link("home/tls", r.at("etc"), 0) }, "home/tls", []int{app}, "home/tls is a symbolic link"},
		"root's link below the user's directory": {func(r *tree) {
			r.dir("home", app, 0o755).dir("home/x", 0, 0o755).dir("etc", 0, 0o755).link("home/x/tls", r.at("etc"), 0)
		}, "home/x/tls", []int{app}, "home/x/tls is a symbolic link"},
		"root's link in sticky":               {func(r *tree) { r.dir("tmp", 0, 0o1777).dir("etc", 0, 0o755).link("tmp/tls", r.at("etc"), 0) }, "tmp/tls", nil, "tmp/tls is a symbolic link"},
		"the user's link in root's directory": {func(r *tree) { r.dir("etc", 0, 0o755).link("tls", r.at("etc"), app) }, "tls", []int{app}, "tls is a symbolic link"},
		"a ring of links":                     {func(r *tree) { r.link("x", "y", 0).link("y", "x", 0) }, "x", nil, "too many levels"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newTree(t)
			test.make(r)
			d, err := OpenDir(r.at(test.path), test.users...)
			if test.says == "" {
				if err != nil {
					t.Fatal(err)
				}
				d.Close()
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v, want it to say %q", err, test.says)
			}
			if errors.Is(err, syscall.ELOOP) == errors.Is(err, ErrUnsafe) {
				t.Errorf("%v: ErrUnsafe: %v", err, errors.Is(err, ErrUnsafe))
			}
		})
	}
}

// What is done in an open directory stays there after its path was given to something else,
// and a link in the place of the file is replaced, not followed.
func TestAnOpenDirectoryStays(t *testing.T) {
	r := newTree(t).dir("a", os.Geteuid(), 0o755).dir("other", os.Geteuid(), 0o755).file("other/f", os.Geteuid(), 0o600)
	d, err := OpenDir(r.at("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := errors.Join(os.Rename(r.at("a"), r.at("moved")), os.Symlink(r.at("other"), r.at("a")), os.Symlink(r.at("other/f"), r.at("moved/f"))); err != nil {
		t.Fatal(err)
	}
	f, err := d.Create("draft", 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString("new")
	if err := errors.Join(f.Close(), d.Rename("draft", "f"), d.Sync()); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(r.at("moved/f")); string(got) != "new" {
		t.Errorf("in the directory: %q", got)
	}
	if got, _ := os.ReadFile(r.at("other/f")); string(got) != "other/f" {
		t.Errorf("elsewhere: %q", got)
	}
	if _, err := d.Create("f", 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("what was there was opened: %v", err)
	}
	if err := d.Remove("f"); err != nil {
		t.Error(err)
	}
}

// A file to be read tells who can change it.
func TestOpenFileTellsWhoCanChangeIt(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make files of several users")
	}
	r := newTree(t).dir("run", 0, 0o755).dir("run/app", app, 0o755).dir("tmp", 0, 0o1777)
	r.file("run/root.pid", 0, 0o644).file("run/of-app.pid", app, 0o644).file("run/app/app.pid", app, 0o644).file("run/app/root.pid", 0, 0o644)
	r.file("run/open.pid", 0, 0o666).file("run/stranger.pid", stranger, 0o644).file("tmp/x.pid", 0, 0o644)
	r.link("var", "run", 0).link("run/link.pid", "root.pid", 0).link("run/app/link.pid", "../root.pid", app)
	if err := syscall.Mkfifo(r.at("run/fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string][]int{"run/root.pid": nil, "var/root.pid": nil, "var/link.pid": nil, "run/of-app.pid": {app}, "run/app/app.pid": {app}, "run/app/root.pid": {app}} {
		f, by, err := OpenFile(r.at(path), app)
		if err != nil || !slices.Equal(by, want) {
			t.Errorf("%s: by %v, %v", path, by, err)
			continue
		}
		text, _ := io.ReadAll(f)
		f.Close()
		if !strings.HasSuffix(string(text), ".pid") {
			t.Errorf("%s: %q", path, text)
		}
	}
	for path, says := range map[string]string{
		"run/open.pid": "mode 0666", "run/stranger.pid": "uid 4712", "tmp/x.pid": "every user", "run/app/link.pid": "symbolic link",
		"run/fifo": "not a regular file", "run/gone": "no such file", "run": "not a regular file", "/": "names a directory",
	} {
		if path != "/" {
			path = r.at(path)
		}
		if f, _, err := OpenFile(path, app); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v %v", path, f, err)
		}
	}
}
