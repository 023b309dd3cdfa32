package files

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/meshagent"
)

// lines is a log.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) has(words string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !strings.Contains(l.text.String(), words) {
		return fmt.Errorf("the log does not say %q: %s", words, l.text.String())
	}
	return nil
}

// On a full disk identities go on: SVIDs are renewed in memory, the files and the cache
// keep what they had, whole, the log says so, and both follow once there is room. A host
// without a key cannot begin, and is told why.
func TestDiskFull(t *testing.T) {
	disk := t.TempDir()
	if err := syscall.Mount("none", disk, "tmpfs", 0, "size=256k,mode=0755"); err != nil {
		t.Skipf("NOT RUN: no small disk can be mounted: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	in := func(name string) string { return filepath.Join(disk, name) }
	phrase := filepath.Join(t.TempDir(), "phrase")
	if err := os.WriteFile(phrase, []byte("a passphrase for the cache"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := catest.Start(t, catest.Options{})
	c.Apply(service("web", mine()))
	configure := func(dataDir string) *meshagent.Config {
		cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
			"trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\ncache: {passphraseFile: %s}\nfiles: [{service: web, certificate: %s, key: %s}]",
			in(dataDir), c.AgentToken("h1", "dc1"), phrase, in("web.pem"), in("web.key"))))
		if err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	log := &lines{}
	logger := slog.New(slog.NewTextHandler(log, nil))
	agent, err := meshagent.New(configure("data"), logger)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx, meshagent.Door{Name: "files", Run: New(agent, logger).Run}) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	var before string
	eventually(t, func() (err error) { before, err = serial(in("web.pem"), in("web.key")); return err })

	filler, err := os.Create(in("filler"))
	if err != nil {
		t.Fatal(err)
	}
	for err = nil; err == nil; {
		_, err = filler.Write(make([]byte, 4096))
	}
	filler.Close()
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if _, err := meshagent.New(configure("other"), nil); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a new host: %v", err)
	}

	c.Apply(service("web", mine()+", hint: changed")) // its SVID is made anew
	held := func() (string, error) {
		svid, err := agent.SVIDs("service/web").GetX509SVID()
		if err != nil {
			return "", err
		}
		return svid.ID.String() + " " + svid.Certificates[0].SerialNumber.String(), nil
	}
	eventually(t, func() error {
		if now, err := held(); err != nil || now == before {
			return fmt.Errorf("it has %s, %v", now, err)
		}
		return nil
	})
	eventually(t, func() error { return log.has("no space left") })
	if got, err := serial(in("web.pem"), in("web.key")); err != nil || got != before {
		t.Errorf("the files: %s, %v; before: %s", got, err, before)
	}
	if left, _ := filepath.Glob(in(".web*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}

	if err := os.Remove(in("filler")); err != nil {
		t.Fatal(err)
	}
	now, err := held()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if got, err := serial(in("web.pem"), in("web.key")); err != nil || got != now {
			return fmt.Errorf("the files: %s, %v; held: %s", got, err, now)
		}
		return nil
	})
	stop()
	next, err := meshagent.New(configure("data"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if svid, err := next.SVIDs("service/web").GetX509SVID(); err != nil || svid.ID.String()+" "+svid.Certificates[0].SerialNumber.String() != now {
		t.Errorf("the next process has %v, %v", svid, err)
	}
}
