// Package safepath opens files and directories by paths that no other user can redirect.
//
// A process of root that writes to /home/app/tls/key.pem would follow a symbolic link that
// app has put in the place of tls. Here every component of a path is opened by itself,
// below the one before and without following links, and its owner and mode are checked on
// what was opened. The rules:
//
//   - A directory belongs to root, to the process's user, or to a user whom the caller names.
//   - Others cannot write to it. What lies below a directory that others cannot enter
//     (no search permission for group and others) may have any mode.
//   - A sticky directory that all may write to, such as /tmp, may be passed through, since
//     nobody else can replace a directory in it that satisfies the first rule. It cannot be
//     the directory of the file itself, in which others could create the file first.
//   - A symbolic link is followed if it belongs to root or the process's user, and only they
//     can change the directories down to it: /var/run -> /run.
//
// Access control lists of POSIX show in the mode's group bits; those of macOS are not seen.
//
// Opening one component at a time gives what openat2 with RESOLVE_NO_SYMLINKS does, on
// kernels before 5.6 and on macOS as well, and lets each owner be checked on the way.
package safepath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const maxLinks = 40 // as the kernel

// ErrUnsafe is what every refusal of a path wraps.
var ErrUnsafe = errors.New("another user could redirect this path")

// unsafe says which component it is, why, and what to do.
type unsafe string

func (u unsafe) Error() string { return string(u) }
func (u unsafe) Unwrap() error { return ErrUnsafe }

func refuse(format string, args ...any) error { return unsafe(fmt.Sprintf(format, args...)) }

// Dir is an open directory. What is done in it is done there, whatever becomes of its path.
type Dir struct {
	f    *os.File
	path string
}

// place is what is known of a directory by the way that led there.
type place struct {
	fd     int
	name   string // path without links
	by     []int  // users besides root and the process's who can change it, or what led to it
	closed bool   // others cannot enter it, or a directory above
	shared bool   // sticky, and all may write to it
}

// OpenDir opens a directory that only root, the process's user and these users can change.
func OpenDir(path string, users ...int) (*Dir, error) {
	w, err := begin(path, users)
	if err != nil {
		return nil, err
	}
	defer w.end()
	if err := w.walk(true); err != nil {
		return nil, err
	}
	return w.dir()
}

// OpenFile opens a regular file for reading which only root, the process's user and these
// users can change. by are those of the users who can change it, or what the path leads to.
func OpenFile(path string, users ...int) (f *os.File, by []int, err error) {
	w, err := begin(path, users)
	if err != nil {
		return nil, nil, err
	}
	defer w.end()
	if err := w.walk(false); err != nil {
		return nil, nil, err
	}
	at := w.top()
	if at.shared {
		return nil, nil, sticky(at.name)
	}
	name := filepath.Join(at.name, w.last)
	// A FIFO without a writer is not waited for.
	fd, err := unix.Openat(at.fd, w.last, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	f = os.NewFile(uintptr(fd), name)
	var is unix.Stat_t
	if err = unix.Fstat(fd, &is); err == nil {
		switch {
		case is.Mode&unix.S_IFMT != unix.S_IFREG:
			err = fmt.Errorf("%s is not a regular file", name)
		case !w.trusts(is.Uid):
			err = refuse("%s belongs to uid %d: %s", name, is.Uid, w.chown())
		case !at.closed && is.Mode&0o022 != 0:
			err = refuse("%s has mode %04o, so that other users can change it: chmod go-w it", name, is.Mode&0o7777)
		}
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, with(at.by, is.Uid), nil
}

// Create makes a new file with this mode, open for writing.
func (d *Dir) Create(name string, mode fs.FileMode) (*os.File, error) {
	fd, err := unix.Openat(d.fd(), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, uint32(mode.Perm()))
	if err != nil {
		return nil, &fs.PathError{Op: "create", Path: filepath.Join(d.path, name), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(d.path, name)), nil
}

// Rename gives a file of the directory another name in it. What has that name is replaced;
// if it is a link, the link itself.
func (d *Dir) Rename(from, to string) error {
	if err := unix.Renameat(d.fd(), from, d.fd(), to); err != nil {
		return &os.LinkError{Op: "rename", Old: filepath.Join(d.path, from), New: filepath.Join(d.path, to), Err: err}
	}
	return nil
}

// Remove removes a file of the directory.
func (d *Dir) Remove(name string) error { return unix.Unlinkat(d.fd(), name, 0) }

// Stat describes the directory.
func (d *Dir) Stat() (fs.FileInfo, error) { return d.f.Stat() }

// Sync has what was created, renamed and removed written to the disk.
func (d *Dir) Sync() error { return d.f.Sync() }

// Close closes the directory.
func (d *Dir) Close() error { return d.f.Close() }

func (d *Dir) fd() int { return int(d.f.Fd()) }

// walker goes from component to component.
type walker struct {
	users []int
	rest  []string // components still to be walked
	last  string   // name of the file, once the walk has ended
	stack []place  // open directories, / first
	links int
}

func begin(path string, users []int) (*walker, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	w := &walker{users: users, rest: split(path)}
	if err := w.root(); err != nil {
		w.end()
		return nil, err
	}
	return w, nil
}

func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

func (w *walker) top() *place { return &w.stack[len(w.stack)-1] }

func (w *walker) end() {
	for _, p := range w.stack {
		unix.Close(p.fd)
	}
	w.stack = nil
}

// root begins at / again.
func (w *walker) root() error {
	w.end()
	fd, err := unix.Open("/", search|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: "/", Err: err}
	}
	return w.enter(fd, "/", place{})
}

// walk opens all components but the last, or with dir the last as well.
func (w *walker) walk(dir bool) error {
	for len(w.rest) > 0 {
		name := w.rest[0]
		w.rest = w.rest[1:]
		if name == "." {
			continue
		}
		if name == ".." { // of a link; those above were reached without links
			if len(w.stack) > 1 {
				unix.Close(w.top().fd)
				w.stack = w.stack[:len(w.stack)-1]
			}
			continue
		}
		at := *w.top()
		path := filepath.Join(at.name, name)
		var is unix.Stat_t
		err := unix.Fstatat(at.fd, name, &is, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && is.Mode&unix.S_IFMT == unix.S_IFLNK {
			if err := w.follow(at, name, is.Uid); err != nil {
				return err
			}
			continue
		}
		if len(w.rest) == 0 && !dir {
			w.last = name
			return nil
		}
		if err != nil {
			return &fs.PathError{Op: "open", Path: path, Err: err}
		}
		fd, err := unix.Openat(at.fd, name, search|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return &fs.PathError{Op: "open", Path: path, Err: err}
		}
		if err := w.enter(fd, path, at); err != nil {
			return err
		}
	}
	if !dir {
		return errors.New("the path names a directory, not a file")
	}
	return nil
}

// follow reads a link and puts the components of its target first.
func (w *walker) follow(at place, name string, uid uint32) error {
	path := filepath.Join(at.name, name)
	if len(at.by) > 0 || at.shared || !master(uid) {
		return refuse("%s is a symbolic link that another user than root%s can change: write the path that it leads to", path, own())
	}
	if w.links++; w.links > maxLinks {
		return &fs.PathError{Op: "open", Path: path, Err: unix.ELOOP}
	}
	target := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(at.fd, name, target)
	if err != nil {
		return &fs.PathError{Op: "readlink", Path: path, Err: err}
	}
	to := string(target[:n])
	w.rest = slices.Concat(split(to), w.rest)
	if filepath.IsAbs(to) {
		return w.root()
	}
	return nil
}

// enter checks an open directory and goes on from there.
func (w *walker) enter(fd int, name string, above place) error {
	w.stack = append(w.stack, place{fd: fd, name: name})
	var is unix.Stat_t
	if err := unix.Fstat(fd, &is); err != nil {
		return &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	at := w.top()
	at.by = with(above.by, is.Uid)
	at.closed = above.closed || is.Mode&0o011 == 0
	switch {
	case !w.trusts(is.Uid):
		return refuse("directory %s belongs to uid %d, who can replace what is below it: %s", name, is.Uid, w.chown())
	case at.closed || is.Mode&0o022 == 0:
	case is.Mode&unix.S_ISVTX != 0:
		at.shared = true
	default:
		return refuse("directory %s has mode %04o, so that other users can replace what is below it: chmod go-w it", name, is.Mode&0o7777)
	}
	return nil
}

// dir opens the directory that the walk has ended in, to be read and synced.
func (w *walker) dir() (*Dir, error) {
	at := *w.top()
	if at.shared {
		return nil, sticky(at.name)
	}
	fd, err := unix.Openat(at.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: at.name, Err: err}
	}
	return &Dir{f: os.NewFile(uintptr(fd), at.name), path: at.name}, nil
}

func sticky(name string) error {
	return refuse("every user can create files in %s: use a directory of its own below it", name)
}

// trusts tells whether a file of this user is one that may be changed by him.
func (w *walker) trusts(uid uint32) bool {
	return master(uid) || slices.Contains(w.users, int(uid))
}

// master tells whether it is root or the process's user.
func master(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

// with adds a user to those besides root and the process's.
func with(by []int, uid uint32) []int {
	if master(uid) || slices.Contains(by, int(uid)) {
		return by
	}
	return append(slices.Clip(by), int(uid))
}

func own() string {
	if uid := os.Geteuid(); uid != 0 {
		return fmt.Sprintf(" and uid %d", uid)
	}
	return ""
}

// chown says whom it should belong to.
func (w *walker) chown() string {
	owners := "root"
	for _, uid := range w.users {
		if uid > 0 {
			owners += fmt.Sprintf(" or uid %d", uid)
		}
	}
	return "chown it to " + owners
}
