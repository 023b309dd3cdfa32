package files

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/entente-mesh/entente/internal/safepath"
)

// file is one file as it should be.
type file struct {
	path string
	mode os.FileMode
	data []byte
}

// draft is a file that is complete but for its name, in an open directory.
type draft struct {
	dir  *safepath.Dir
	name string // under which it stands now
	base string // under which it is to stand
}

// write makes all files complete beside their places and then puts them there, in
// order. If one cannot be made, none is put. The files' owner and these users are the
// only ones besides root and the agent's user who may own directories on the way.
func write(list []file, owner ids, users ...int) error {
	if owner.uid >= 0 {
		users = append([]int{owner.uid}, users...)
	}
	var drafts []draft
	defer func() {
		for _, d := range drafts {
			if d.name != "" {
				d.dir.Remove(d.name)
			}
			d.dir.Close()
		}
	}()
	for _, f := range list {
		dir, err := safepath.OpenDir(filepath.Dir(f.path), users...)
		if err != nil {
			return fmt.Errorf("cannot write %s: %w", f.path, err)
		}
		drafts = append(drafts, draft{dir: dir, base: filepath.Base(f.path)})
		d := &drafts[len(drafts)-1]
		name := "." + d.base + "." + rand.Text()[:8]
		// Nobody else can read it before it has its owner.
		w, err := dir.Create(name, 0o600)
		if err != nil {
			return fmt.Errorf("cannot write %s: %w", f.path, err)
		}
		d.name = name
		if err := errors.Join(fill(w, f, owner), w.Close()); err != nil {
			if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
				return fmt.Errorf("cannot write %s: no space left on the disk; free some: %w", f.path, err)
			}
			return fmt.Errorf("cannot write %s: %w", f.path, err)
		}
	}
	for i := range drafts {
		d := &drafts[i]
		if err := d.dir.Rename(d.name, d.base); err != nil {
			return fmt.Errorf("cannot put %s in its place: %w", list[i].path, err)
		}
		d.name = ""
	}
	for i, d := range drafts {
		if err := d.dir.Sync(); err != nil {
			return fmt.Errorf("cannot sync the directory of %s: %w", list[i].path, err)
		}
	}
	return nil
}

func fill(w *os.File, f file, owner ids) error {
	if _, err := w.Write(f.data); err != nil {
		return err
	}
	if owner != (ids{-1, -1}) {
		if err := w.Chown(owner.uid, owner.gid); err != nil {
			return err
		}
	}
	if err := w.Chmod(f.mode); err != nil { // after Chown, which may take bits away
		return err
	}
	return w.Sync()
}
