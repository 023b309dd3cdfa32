package replica

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
)

// Heal makes a log durable again after its disk failed: it writes all of it anew. After a
// failed write the kernel may show pages from memory that never reached the disk and
// that it no longer tries to write; a copy that was synced without an error is on it.
// The replica that failed must be Released. It needs room for a second log.
func Heal(dir string) error {
	path := filepath.Join(dir, stateDir, logFile)
	if err := heal(path); err != nil {
		os.Remove(path + ".new")
		return fmt.Errorf("cannot write the log %s anew: %w", path, err)
	}
	return nil
}

func heal(path string) error {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second, ReadOnly: true, PreLoadFreelist: false})
	if err != nil {
		return err
	}
	fresh, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return errors.Join(err, db.Close())
	}
	err = guarded(func() error {
		return db.View(func(tx *bbolt.Tx) error {
			_, err := tx.WriteTo(fresh)
			return err
		})
	})
	if err == nil {
		err = fresh.Sync()
	}
	if err := errors.Join(err, fresh.Close(), db.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

const divergedFile = "diverged"

// Diverge stops this node for good: at the log index, its state was not what a majority
// of the voters had. Run returns ErrDiverged, and so does every Open: what stands on
// this disk would only diverge again.
func (r *Replica) Diverge(index uint64) {
	why := fmt.Sprintf("log entry %d", index)
	err := writeSynced(filepath.Join(r.cfg.Dir, stateDir, divergedFile), []byte(why))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		r.log.Error("cannot note that this node's state differs from the others'", "error", err)
	}
	r.leave(fmt.Errorf("%w (%s)", ErrDiverged, why), true)
}

func diverged(dir string) error {
	why, err := os.ReadFile(filepath.Join(dir, divergedFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	return fmt.Errorf("%w (%.100s)", ErrDiverged, why)
}
