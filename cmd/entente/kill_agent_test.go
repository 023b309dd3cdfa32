//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/files"
	"github.com/entente-mesh/entente/scenarios/killpoint"
)

// An agent is killed before changes to its files, from its first start on and while the
// SVID of its service is renewed. What it has written is whole. Once its cache stood,
// the next process has valid SVIDs without a CA; in any case it is admitted, although its
// token was spent, and brings certificate and key of the files together.
func TestKillAgent(t *testing.T) {
	t.Parallel()
	wholeRun(t)
	c := catest.Start(t, catest.Options{})
	apply := func(name, hint string) {
		c.Apply(fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: %s, owner: team}\nspec: {run: {uid: %d, hosts: [%[1]s]}, hint: %[3]s}\n", name, os.Getuid(), hint))
	}
	life := func(at int) (killpoint.Result, func()) {
		name := fmt.Sprintf("h%d", at+1)
		dir, err := os.MkdirTemp("", "kill") // a socket's path is short
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		in := func(path string) string { return filepath.Join(dir, path) }
		write := func(path, text string) {
			if err := os.WriteFile(in(path), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		os.Mkdir(in("files"), 0o755)
		write("phrase", "a passphrase for the cache")
		config := fmt.Sprintf("trustDomain: banking.example\nname: %[1]s\ndatacenter: dc1\ndataDir: %[2]s/data\nca: {token: %[3]s}\n"+
			"workloadAPI: {socket: %[2]s/api}\nadmin: {socket: %[2]s/admin}\ncache: {passphraseFile: %[2]s/phrase}\n"+
			"files:\n- {service: %[1]s, certificate: %[2]s/files/cert.pem, key: %[2]s/files/key.pem, bundle: %[2]s/files/ca.pem}\n",
			name, dir, c.AgentToken(name, "dc1", "127.0.0.1"))
		write("agent.yaml", config)
		apply(name, "one")

		pids, ended := make(chan int, 1), make(chan killpoint.Result, 1)
		go func() {
			ended <- killedWhere(t, killpoint.Command{
				Dir: dir, Args: []string{"agent", "run", "--config", in("agent.yaml")},
				Counts:  func(file string) bool { return strings.HasPrefix(file, "data/") || strings.HasPrefix(file, "files/") },
				Started: func(pid int) { pids <- pid },
			}, at)
		}()
		pid := <-pids
		var stands, dead atomic.Bool
		var result killpoint.Result
		until := func(done func() bool) {
			for deadline := time.Now().Add(time.Minute); !dead.Load() && !done(); {
				select {
				case result = <-ended:
					dead.Store(true)
				case <-time.After(10 * time.Millisecond):
				}
				if time.Now().After(deadline) {
					t.Error("the agent does not go on")
					return
				}
			}
		}
		content := func(path string) string {
			data, _ := os.ReadFile(in(path))
			return string(data)
		}
		until(func() bool { return content("files/key.pem") != "" && content("data/cache.sealed") != "" })
		stands.Store(!dead.Load())
		cert := content("files/cert.pem")
		if !dead.Load() {
			apply(name, "two") // another revision of the entry: its SVID is made anew
			until(func() bool { return content("files/cert.pem") != cert })
		}
		if !dead.Load() {
			syscall.Kill(pid, syscall.SIGTERM) // whereupon it seals what is new
			result = <-ended
		}

		return result, func() {
			at := fmt.Sprintf("killed at %d of %v", len(result.Points), result.Points[max(0, len(result.Points)-2):])
			for _, path := range []string{"files/cert.pem", "files/key.pem", "files/ca.pem"} {
				if data, err := os.ReadFile(in(path)); err == nil {
					if block, rest := pem.Decode(data); block == nil || len(rest) > 0 && !strings.HasPrefix(string(rest), "-----BEGIN") {
						t.Errorf("%s: %s is torn: %q", at, path, data)
					}
				}
			}
			read, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(config))
			if err != nil {
				t.Fatal(err)
			}
			agent, err := meshagent.New(read, nil)
			if err != nil {
				t.Fatalf("%s: %v", at, err)
			}
			if stands.Load() {
				if err := agent.Ready(); err != nil {
					t.Errorf("%s: without a CA the next process says: %v", at, err)
				} else if svid, err := agent.SVIDs("service/" + name).GetX509SVID(); err != nil || time.Until(svid.Certificates[0].NotAfter) < time.Minute {
					t.Errorf("%s: without a CA it has %v, %v", at, svid, err)
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			over := make(chan error, 1)
			go func() {
				over <- agent.Run(ctx, meshagent.Door{Name: "files", Run: files.New(agent, nil).Run})
			}()
			defer func() {
				cancel()
				if err := <-over; err != nil {
					t.Errorf("%s: %v", at, err)
				}
			}()
			err = errors.New("not yet")
			for deadline := time.Now().Add(30 * time.Second); err != nil && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
				if err = agent.Ready(); err == nil {
					_, err = tls.LoadX509KeyPair(in("files/cert.pem"), in("files/key.pem"))
				}
			}
			if err != nil {
				t.Errorf("%s: %v", at, err)
			}
			left, _ := filepath.Glob(in("data/*"))
			if len(left) > 4 {
				t.Errorf("%s: left behind: %v", at, left)
			}
		}
	}
	whole, check := life(-1)
	if whole.ExitCode != 0 || len(whole.Points) < 20 {
		t.Fatalf("%+v", whole)
	}
	t.Logf("%d points: %v", len(whole.Points), whole.Points)
	check()
	each(t, len(whole.Points), 15, func(at int) {
		r, check := life(at)
		if !r.Killed {
			t.Logf("point %d was not met", at)
		}
		check()
	})
}
