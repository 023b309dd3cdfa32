package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// WriteFileAtomic writes a file so that after a crash at any moment the path holds either the old content or the new, with
// exactly this mode. When it returns nil the new content is on the disk. On an error the old content stays, except when
// only the directory could not be synced.
func WriteFileAtomic(path string, data []byte, mode fs.FileMode) error {
	if err := writeFileAtomic(path, data, mode); err != nil {
		return explain(path, err)
	}
	return nil
}

func explain(path string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("cannot write %s: no space left on the disk that holds %s; free some and try again: %w", path, filepath.Dir(path), err)
	default:
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
}

func writeFileAtomic(path string, data []byte, mode fs.FileMode) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	if err := fill(f, data, mode); err != nil {
		os.Remove(f.Name())
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		os.Remove(f.Name())
		return err
	}
	return syncDir(dir)
}

// fill writes, syncs and closes f. The sync comes before the rename, or a crash could leave the new name without its content.
func fill(f *os.File, data []byte, mode fs.FileMode) error {
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
