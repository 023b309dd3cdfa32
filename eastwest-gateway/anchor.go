package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/daemon"
)

const anchorFile = "ca.anchor"

// anchor keeps on the disk whom the gateway believes as a CA node.
type anchor struct {
	path string // empty: nowhere
	kept []byte
}

// openAnchor reads what a process before kept; the zero Anchor if none did. A damaged file
// is an error: without it the first CA node that answers would be believed.
func openAnchor(dir string) (*anchor, client.Anchor, error) {
	if dir == "" {
		return &anchor{}, client.Anchor{}, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, client.Anchor{}, fmt.Errorf("dataDir: %w", err)
	}
	a := &anchor{path: filepath.Join(dir, anchorFile)}
	data, err := os.ReadFile(a.path)
	if errors.Is(err, fs.ErrNotExist) {
		return a, client.Anchor{}, nil
	}
	if err != nil {
		return nil, client.Anchor{}, fmt.Errorf("dataDir: %w", err)
	}
	known, err := client.ParseAnchor(data)
	if err != nil {
		return nil, client.Anchor{}, fmt.Errorf("%s is damaged: delete it to trust the CA node that answers first again: %w", a.path, err)
	}
	a.kept = data
	return a, known, nil
}

// keep writes what changed.
func (a *anchor) keep(now client.Anchor) error {
	if a.path == "" || now.Cluster == nil {
		return nil
	}
	data, err := now.Marshal()
	if err != nil || bytes.Equal(data, a.kept) {
		return err
	}
	if err := daemon.WriteFileAtomic(a.path, data, 0o600); err != nil {
		return err
	}
	a.kept = data
	return nil
}
