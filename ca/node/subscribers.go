package node

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/internal/daemon"
)

// rollFile names the subscribers that count for the ready gate. A node that restarts
// would else forget those that cannot come back just now, and let authorities sign that
// they do not hold (I3). It holds names only.
const rollFile = "subscribers.json"

// maxRoll bounds the file, in bytes.
const maxRoll = 64 << 20

// rollEvery is how long changes are gathered before the file is written.
const rollEvery = time.Second

// recall reads the roll of before. One that cannot be read stops nothing: it
// is as if there had been no subscriber, and said.
func (g *gate) recall() {
	path := filepath.Join(g.cfg.DataDir, rollFile)
	var known []feed.Known
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err == nil && info.Size() > maxRoll {
		err = errors.New("it is too large")
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(path)
	}
	if err == nil {
		err = json.Unmarshal(data, &known)
	}
	if err != nil {
		g.log.Error("the subscribers of before the restart cannot be read: those that do not come back are not waited for", "file", path, "error", err)
		return
	}
	g.feed.Recall(time.Now(), known)
}

// runRoll keeps the roll on the disk.
func (g *gate) runRoll(ctx context.Context) error {
	path, failed := filepath.Join(g.cfg.DataDir, rollFile), false
	for {
		select {
		case <-g.feed.Roster:
		case <-ctx.Done():
			return ctx.Err()
		}
		data, err := json.Marshal(g.feed.Roll())
		if err == nil {
			err = daemon.WriteFileAtomic(path, data, 0o600)
		}
		if err != nil && !failed {
			g.log.Error("this node's subscribers cannot be written down: after a restart those that do not come back are not waited for", "error", err)
		}
		failed = err != nil
		if err := sleep(ctx, rollEvery); err != nil {
			return err
		}
	}
}
