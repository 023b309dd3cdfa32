package evil

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/entente-mesh/entente/ca/node"
)

// A process gets its orders by its environment, so that the test's own flags stay.
const (
	envConfig = "ENTENTE_EVIL_CONFIG" // the configuration of the node that was taken over
	envForged = "ENTENTE_EVIL_FORGED" // file for an SVID under the attacker's root
	envPath   = "ENTENTE_EVIL_PATH"   // its path
	envLies   = "ENTENTE_EVIL_LIES"   // names, with commas between
)

// Orders are what a process shall do.
type Orders struct {
	Config string   // file of the node that was taken over; it is not running
	Lies   []string // names of Known; the process tells the truth until it gets SIGUSR1
	// Forged is where the process leaves an SVID of Path under the attacker's root, and its
	// key, as PEM. It is there when the node listens.
	Forged, Path string
}

// Known are the lies that a process can be told by name.
func Known() map[string]Lie {
	known := make(map[string]Lie)
	for _, l := range []Lie{OwnRoot(), Ahead(FarAhead), Ahead(NextEpoch), Ahead(LastEpoch), Alone(), HiddenRevocations(), OldPicture(), Replayed(), LaterConnects(), OldEpoch(), Flood(1000)} {
		known[l.Name] = l
	}
	return known
}

// Env is the environment of a process of the test's own binary that carries the orders
// out: TestMain of that binary calls Main.
func (o Orders) Env() []string {
	return []string{envConfig + "=" + o.Config, envForged + "=" + o.Forged, envPath + "=" + o.Path, envLies + "=" + strings.Join(o.Lies, ",")}
}

// Main runs the node of the orders, if there are some, until SIGTERM, and does not return
// then. TestMain calls it first.
func Main() {
	if os.Getenv(envConfig) == "" {
		return
	}
	o := Orders{Config: os.Getenv(envConfig), Forged: os.Getenv(envForged), Path: os.Getenv(envPath), Lies: strings.Split(os.Getenv(envLies), ",")}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := o.run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func (o Orders) run(ctx context.Context) error {
	file, err := os.Open(o.Config)
	if err != nil {
		return err
	}
	cfg, err := node.ReadConfig(o.Config, file)
	file.Close()
	if err != nil {
		return err
	}
	m, err := Open(cfg)
	if err != nil {
		return err
	}
	var lies []Lie
	for _, name := range o.Lies {
		lie, ok := Known()[name]
		if !ok {
			return fmt.Errorf("no lie is named %q", name)
		}
		lies = append(lies, lie)
	}
	n, err := node.New(cfg, slog.New(slog.NewTextHandler(os.Stderr, nil)), node.Listeners{Between: m.between()})
	if err != nil {
		return err
	}
	if o.Forged != "" {
		if err := m.forge(o.Forged, o.Path); err != nil {
			return errors.Join(err, n.Close())
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	begin := make(chan os.Signal, 1)
	signal.Notify(begin, syscall.SIGUSR1)
	defer signal.Stop(begin)
	var tasks sync.WaitGroup
	tasks.Go(func() { m.attend(ctx, n) })
	tasks.Go(func() {
		select {
		case <-begin:
			m.Tell(lies...)
		case <-ctx.Done():
		}
	})
	defer func() { cancel(); tasks.Wait() }()
	return n.Run(ctx)
}

// forge writes an SVID under the attacker's root, and its key.
func (m *Member) forge(file, path string) error {
	svid := m.Root.Issue(path)
	key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	for _, cert := range svid.Certificates {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return os.WriteFile(file, text, 0o600)
}
