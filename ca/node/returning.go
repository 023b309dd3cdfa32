package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/internal/daemon"
)

const (
	probeEvery   = 2 * time.Second
	probeTimeout = 2 * time.Second
	probeSize    = 1 << 20 // as much must fit, or the log would fail again at once
	probesNeeded = 2       // good ones in a row
)

// returning runs the replica, and opens it again when its disk has come back.
type returning struct {
	*core
	swapped  broadcast // another replica took the place of a failed one
	config   func() replica.Config
	restored func() // derives everything from the state anew
}

// run runs the node's part in the agreement. When its disk fails, the node goes on
// signing from memory, and takes part again by itself once the disk works and holds
// everything that this node confirmed to the others. It returns as Run of package replica.
func (r *returning) run(ctx context.Context) error {
	for {
		now := r.replica.Load()
		running, stop := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() { ended <- now.Run(running) }()
		select {
		case err := <-ended:
			stop()
			return err
		case <-now.Down():
		}
		if !errors.Is(now.Err(), replica.ErrDisk) && !errors.Is(now.Err(), replica.ErrStuck) {
			err := <-ended // at once, or with ctx
			stop()
			return err
		}
		r.log.Error("this node is out of the agreement; it signs from memory and tries to return", "error", now.Err(), "data_dir", r.cfg.DataDir)
		next := r.comeBack(ctx, now, stop, ended)
		stop()
		if next == nil {
			return nil // ctx ended; what Close says of a failed disk is known already
		}
		r.replica.Store(next)
		r.swapped.tell()
		r.restored()
		r.log.Info("this node takes part in the agreement again", "applied", next.Applied())
	}
}

// comeBack waits for the disk and opens the replica again; nil when ctx ended first.
func (r *returning) comeBack(ctx context.Context, failed *replica.Replica, stop func(), ended <-chan error) *replica.Replica {
	good := 0
	closed := false
	said := ""
	say := func(err error) {
		if text := err.Error(); text != said {
			said = text
			r.log.Warn("this node cannot take part again yet; trying on. If the disk is lost: remove this node and join a new one (docs/operations.md, \"Lost node\")", "error", err)
		}
	}
	end := func() {
		if !closed {
			stop()
			<-ended
			closed = true
		}
	}
	defer end()
	for {
		if sleep(ctx, probeEvery) != nil {
			return nil
		}
		if err := probe(ctx, r.cfg.DataDir); err != nil {
			good = 0
			say(err)
			continue
		}
		if good++; good < probesNeeded {
			continue
		}
		end()
		select {
		case <-failed.Released():
		case <-time.After(probeTimeout):
			say(errors.New("a write of before still hangs"))
			good = 0
			continue
		case <-ctx.Done():
			return nil
		}
		next, err := r.openAgain(failed)
		switch {
		case err == nil:
			return next
		case errors.Is(err, replica.ErrForgetful):
			r.log.Error("this node stays out of the agreement; it signs until it is stopped", "error", err)
			<-ctx.Done()
			return nil
		}
		say(err)
		good = 0
	}
}

// openAgain opens what the failed replica left, after everything in it was written anew.
func (r *returning) openAgain(failed *replica.Replica) (*replica.Replica, error) {
	if err := replica.Heal(r.cfg.DataDir); err != nil {
		return nil, err
	}
	listener, err := daemon.Listen(r.cfg.Listen.Raft)
	if err != nil {
		return nil, err
	}
	cfg := r.config()
	cfg.Listener, cfg.Agreed, cfg.Durable = listener, failed.Applied(), failed.Durable()
	next, err := replica.Open(cfg)
	if err != nil {
		listener.Close()
		return nil, err
	}
	if next.Applied() < failed.Applied() {
		// Subscribers were told more than the disk holds: nobody's revision goes back.
		err := fmt.Errorf("%w: its state ends at entry %d, this node had applied %d", replica.ErrForgetful, next.Applied(), failed.Applied())
		return nil, errors.Join(err, next.Close())
	}
	return next, nil
}

// probe writes, syncs and deletes a file, and gives up on a disk that hangs: the
// goroutine in the write ends with it.
func probe(ctx context.Context, dir string) error {
	done := make(chan error, 1)
	go func() { done <- probeDisk(filepath.Join(dir, ".probe")) }()
	select {
	case err := <-done:
		return err
	case <-time.After(probeTimeout):
		return errors.New("the disk still hangs")
	case <-ctx.Done():
		return ctx.Err()
	}
}

func probeDisk(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, probeSize))
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close(), os.Remove(path))
}
