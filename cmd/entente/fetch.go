package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/entente-mesh/entente/internal/daemon"
)

const (
	socketVariable      = "SPIFFE_ENDPOINT_SOCKET"
	defaultWorkloadAPI  = "unix:///run/entente/agent.sock"
	maxWorkloadResponse = 16 << 20
)

func fetchCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "fetch",
		Short: "Fetch what the Workload API gives to this process",
		Long: `Fetch SVIDs and bundles from the SPIFFE Workload API, of this agent or of any other
implementation. Who you are is seen by the agent: the user and the executable of this
command are attested like any workload's.

Private keys are never printed; --write puts them, and tokens, into files of mode 0600.`,
		Example: `  entente fetch x509
  entente fetch x509 --write /run/myapp --watch     # svid.0.pem, svid.0.key, bundle.0.pem, kept fresh
  entente fetch jwt --audience ledger.banking.example
  entente fetch bundle --json`,
	}, fetchX509Command(), fetchJWTCommand(), fetchWITCommand(), fetchBundleCommand())
}

// workloadFlags are the flags of every verb that talks to the Workload API.
type workloadFlags struct {
	socket  string
	json    bool
	timeout time.Duration
}

func (f *workloadFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.socket, "socket", cmp.Or(os.Getenv(socketVariable), defaultWorkloadAPI), "Workload API: a path, unix:///PATH or tcp://IP:PORT; default "+socketVariable)
	c.Flags().BoolVar(&f.json, "json", false, "print JSON")
	c.Flags().DurationVar(&f.timeout, "timeout", 10*time.Second, "how long to wait for the first answer")
}

// endpoint reads an address as Workload Endpoint 4 writes it, or a bare path.
func endpoint(address string) (string, error) {
	bad := fmt.Errorf("%q is no Workload API address; write unix:///PATH or tcp://IP:PORT", address)
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		path = strings.TrimPrefix(path, "//")
		if !strings.HasPrefix(path, "/") || strings.ContainsAny(path, "?#") {
			return "", bad
		}
		return "unix://" + path, nil
	}
	if host, ok := strings.CutPrefix(address, "tcp://"); ok {
		ip, port, err := net.SplitHostPort(host)
		if n, numErr := strconv.ParseUint(port, 10, 16); err != nil || numErr != nil || n == 0 || net.ParseIP(ip) == nil {
			return "", bad
		}
		return "passthrough:///" + host, nil
	}
	if strings.Contains(address, "://") || address == "" {
		return "", bad
	}
	path, err := filepath.Abs(address)
	if err != nil {
		return "", err
	}
	return "unix://" + path, nil
}

// call runs do with a client of the Workload API.
func (f *workloadFlags) call(c *cobra.Command, do func(context.Context, workload.SpiffeWorkloadAPIClient) error) error {
	target, err := endpoint(f.socket)
	if err != nil {
		return usageError{c, err}
	}
	if path, ok := strings.CutPrefix(target, "unix://"); ok {
		if _, err := os.Stat(path); err != nil {
			return status.Errorf(codes.Unavailable, "no agent answers at %s: %v; is it running on this host, and is --socket or %s right?", path, err, socketVariable)
		}
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxWorkloadResponse)))
	if err != nil {
		return fmt.Errorf("dial %s: %w", target, err)
	}
	defer conn.Close()
	return do(metadata.AppendToOutgoingContext(c.Context(), "workload.spiffe.io", "true"), workload.NewSpiffeWorkloadAPIClient(conn))
}

// fetchFlags are those of the verbs that fetch.
type fetchFlags struct {
	workloadFlags
	watch bool
	write string
}

func (f *fetchFlags) register(c *cobra.Command) {
	f.workloadFlags.register(c)
	c.Flags().BoolVar(&f.watch, "watch", false, "stay, and show (or write) again what changes")
	c.Flags().StringVar(&f.write, "write", "", "directory to write PEM and token files into, keys with mode 0600")
}

// result is what one answer comes to.
type result struct {
	json  any
	table func(io.Writer) // columns divided by tabs
	files []file
}

type file struct {
	name string
	data []byte
	mode os.FileMode
}

// show prints a result and writes its files.
func (f *fetchFlags) show(c *cobra.Command, r result) error {
	out := c.OutOrStdout()
	if f.write != "" {
		if err := os.MkdirAll(f.write, 0o700); err != nil {
			return err
		}
		for _, one := range r.files {
			if err := daemon.WriteFileAtomic(filepath.Join(f.write, one.name), one.data, one.mode); err != nil {
				return err
			}
		}
	}
	if f.json {
		encoder := json.NewEncoder(out)
		if !f.watch { // with --watch each is one line
			encoder.SetIndent("", "  ")
		}
		return encoder.Encode(r.json)
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	r.table(table)
	if err := table.Flush(); err != nil {
		return err
	}
	for _, one := range r.files {
		if f.write != "" {
			fmt.Fprintf(out, "wrote %s\n", filepath.Join(f.write, one.name))
		}
	}
	return nil
}

// watchStream shows each answer of a stream: the first one, or all with --watch, over
// reconnects.
func watchStream[R any](c *cobra.Command, f *fetchFlags, open func(context.Context, workload.SpiffeWorkloadAPIClient) (grpc.ServerStreamingClient[R], error), read func(*R) (result, error)) error {
	return f.call(c, func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) error {
		shown := false
		for {
			err := func() error {
				ctx, cancel := context.WithCancel(ctx)
				defer cancel()
				late := time.AfterFunc(f.timeout, cancel)
				defer late.Stop()
				stream, err := open(ctx, api)
				if err != nil {
					return err
				}
				for {
					message, err := stream.Recv()
					if !late.Stop() && ctx.Err() != nil {
						return status.Errorf(codes.DeadlineExceeded, "the Workload API gave no answer within %v", f.timeout)
					}
					if err != nil {
						return err
					}
					r, err := read(message)
					if err == nil {
						err = f.show(c, r)
					}
					if err != nil || !f.watch {
						return err
					}
					shown = true
				}
			}()
			if !f.watch || !shown || status.Code(err) != codes.Unavailable {
				return err
			}
			fmt.Fprintf(c.ErrOrStderr(), "the Workload API is away (%s); coming back\n", message(err))
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
}

func fetchX509Command() *cobra.Command {
	var flags fetchFlags
	c := &cobra.Command{
		Use:     "x509",
		Short:   "Fetch X.509-SVIDs",
		Example: "  entente fetch x509 --write /run/myapp --watch",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return watchStream(c, &flags, func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) (grpc.ServerStreamingClient[workload.X509SVIDResponse], error) {
				return api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			}, readX509)
		},
	}
	flags.register(c)
	return c
}

func readX509(response *workload.X509SVIDResponse) (r result, err error) {
	type row struct {
		ID          string    `json:"spiffe_id"`
		Hint        string    `json:"hint,omitempty"`
		NotBefore   time.Time `json:"not_before"`
		NotAfter    time.Time `json:"not_after"`
		Serial      string    `json:"serial_number"`
		X509SVID    string    `json:"x509_svid"` // PEM
		Bundle      string    `json:"bundle"`    // PEM
		Authorities int       `json:"authorities"`
	}
	document := struct {
		SVIDs     []row             `json:"svids"`
		Federated map[string]string `json:"federated_bundles"` // PEM
	}{SVIDs: []row{}, Federated: map[string]string{}}
	for i, svid := range response.GetSvids() {
		parsed, err := x509svid.ParseRaw(svid.GetX509Svid(), svid.GetX509SvidKey()) // and whether they belong together
		if err == nil && parsed.ID.String() != svid.GetSpiffeId() {
			err = fmt.Errorf("it is for %s", parsed.ID)
		}
		if err != nil {
			return r, fmt.Errorf("the X.509-SVID that came for %q is of no use: %w", svid.GetSpiffeId(), err)
		}
		chain := parsed.Certificates
		authorities, err := x509.ParseCertificates(svid.GetBundle())
		if err == nil && len(authorities) == 0 {
			err = errors.New("it is empty")
		}
		if err != nil {
			return r, fmt.Errorf("the bundle beside %s cannot be read: %w", svid.GetSpiffeId(), err)
		}
		document.SVIDs = append(document.SVIDs, row{
			svid.GetSpiffeId(), svid.GetHint(), chain[0].NotBefore, chain[0].NotAfter, chain[0].SerialNumber.Text(16),
			string(certificatesPEM(chain)), string(certificatesPEM(authorities)), len(authorities),
		})
		r.files = append(r.files,
			file{fmt.Sprintf("svid.%d.key", i), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: svid.GetX509SvidKey()}), 0o600},
			file{fmt.Sprintf("svid.%d.pem", i), certificatesPEM(chain), 0o644},
			file{fmt.Sprintf("bundle.%d.pem", i), certificatesPEM(authorities), 0o644})
	}
	for i, td := range slices.Sorted(maps.Keys(response.GetFederatedBundles())) {
		authorities, err := x509.ParseCertificates(response.GetFederatedBundles()[td])
		if err != nil {
			return r, fmt.Errorf("the bundle of %s cannot be read: %w", td, err)
		}
		document.Federated[td] = string(certificatesPEM(authorities))
		r.files = append(r.files, file{fmt.Sprintf("federated_bundle.0.%d.pem", i), certificatesPEM(authorities), 0o644})
	}
	r.json = document
	r.table = func(w io.Writer) {
		fmt.Fprintln(w, "SPIFFE ID\tHINT\tVALID UNTIL\tSERIAL\tAUTHORITIES")
		for _, s := range document.SVIDs {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\n", s.ID, cmp.Or(s.Hint, "-"), s.NotAfter.UTC().Format(time.RFC3339), s.Serial, s.Authorities)
		}
		for _, td := range slices.Sorted(maps.Keys(document.Federated)) {
			fmt.Fprintf(w, "federates with %s\n", strings.TrimPrefix(td, "spiffe://"))
		}
	}
	return r, nil
}

func certificatesPEM(chain []*x509.Certificate) []byte {
	var out bytes.Buffer
	for _, cert := range chain {
		pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
	}
	return out.Bytes()
}

// tokenRow is a JWT- or WIT-SVID as it is shown.
type tokenRow struct {
	ID      string    `json:"spiffe_id"`
	Hint    string    `json:"hint,omitempty"`
	Expires time.Time `json:"expires"`
	Token   string    `json:"token,omitempty"`
}

func newTokenRow(id, hint, token string) (tokenRow, error) {
	var claims struct {
		Exp float64 `json:"exp"`
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return tokenRow{}, fmt.Errorf("the token of %s is none", id)
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		return tokenRow{}, fmt.Errorf("the token of %s cannot be read: %w", id, err)
	}
	return tokenRow{id, hint, time.Unix(int64(claims.Exp), 0).UTC(), token}, nil
}

// tokenResult shows tokens, unless they go into files: then a log of the output is of
// no use to a thief.
func tokenResult(rows []tokenRow, files []file, written bool) result {
	shown := slices.Clone(rows)
	for i := range shown {
		if written {
			shown[i].Token = ""
		}
	}
	return result{
		json: struct {
			SVIDs []tokenRow `json:"svids"`
		}{shown},
		table: func(w io.Writer) {
			for _, row := range rows {
				fmt.Fprintf(w, "SPIFFE ID\t%s\n", row.ID)
				if row.Hint != "" {
					fmt.Fprintf(w, "HINT\t%s\n", row.Hint)
				}
				fmt.Fprintf(w, "VALID UNTIL\t%s\n", row.Expires.Format(time.RFC3339))
				if !written {
					fmt.Fprintf(w, "TOKEN\t%s\n", row.Token)
				}
			}
		},
		files: files,
	}
}

func fetchJWTCommand() *cobra.Command {
	var (
		flags    fetchFlags
		audience []string
		id       string
	)
	c := &cobra.Command{
		Use:   "jwt",
		Short: "Fetch JWT-SVIDs for an audience",
		Long: `Fetch a JWT-SVID for each of this process's identities, or for the one that --spiffe-id
names. Whoever holds a token may use it at every one of its audiences: name one.`,
		Example: `  entente fetch jwt --audience ledger.banking.example
  curl -H "Authorization: Bearer $(entente fetch jwt --audience ledger --json | jq -r .svids[0].token)" https://ledger/`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			if len(audience) == 0 {
				return usageError{c, errors.New("--audience is missing: who is to accept the token")}
			}
			return flags.call(c, func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) error {
				for {
					first, err := fetchJWT(ctx, c, &flags, api, &workload.JWTSVIDRequest{Audience: audience, SpiffeId: id})
					if err != nil || !flags.watch {
						return err
					}
					select { // the agent has a fresh one from half of its life on
					case <-time.After(max(time.Until(first)*55/100, time.Second)):
					case <-ctx.Done():
						return ctx.Err()
					}
				}
			})
		},
	}
	flags.register(c)
	c.Flags().StringSliceVar(&audience, "audience", nil, "who is to accept the token; repeatable")
	c.Flags().StringVar(&id, "spiffe-id", "", "only this identity")
	return c
}

// fetchJWT shows the tokens and returns when the first of them ends. With --watch it
// tries again while the agent is away.
func fetchJWT(ctx context.Context, c *cobra.Command, f *fetchFlags, api workload.SpiffeWorkloadAPIClient, request *workload.JWTSVIDRequest) (time.Time, error) {
	var response *workload.JWTSVIDResponse
	for {
		attempt, cancel := context.WithTimeout(ctx, f.timeout)
		var err error
		response, err = api.FetchJWTSVID(attempt, request)
		cancel()
		if err == nil {
			break
		}
		if code := status.Code(err); !f.watch || code != codes.Unavailable && code != codes.ResourceExhausted {
			return time.Time{}, err
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return time.Time{}, ctx.Err()
		}
	}
	var rows []tokenRow
	var files []file
	var first time.Time
	for i, svid := range response.GetSvids() {
		row, err := newTokenRow(svid.GetSpiffeId(), svid.GetHint(), svid.GetSvid())
		if err != nil {
			return first, err
		}
		if first.IsZero() || row.Expires.Before(first) {
			first = row.Expires
		}
		rows = append(rows, row)
		files = append(files, file{fmt.Sprintf("jwt_svid.%d.token", i), []byte(row.Token), 0o600})
	}
	return first, f.show(c, tokenResult(rows, files, f.write != ""))
}

func fetchWITCommand() *cobra.Command {
	var flags fetchFlags
	var id string
	c := &cobra.Command{
		Use:   "wit",
		Short: "Fetch WIT-SVIDs, where the agent serves them",
		Long: `Fetch a WIT-SVID for each of this process's identities, or for the one that --spiffe-id
names. A WIT-SVID is of use only together with its key: --write stores both.`,
		Example: "  entente fetch wit --write /run/myapp --watch",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return watchStream(c, &flags, func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) (grpc.ServerStreamingClient[workload.WITSVIDResponse], error) {
				return api.FetchWITSVID(ctx, &workload.WITSVIDRequest{SpiffeId: id})
			}, func(response *workload.WITSVIDResponse) (result, error) {
				var rows []tokenRow
				var files []file
				for i, svid := range response.GetSvids() {
					row, err := newTokenRow(svid.GetSpiffeId(), svid.GetHint(), svid.GetWitSvid())
					if err != nil {
						return result{}, err
					}
					rows = append(rows, row)
					files = append(files,
						file{fmt.Sprintf("wit_svid.%d.key.jwk", i), []byte(svid.GetWitSvidKey()), 0o600},
						file{fmt.Sprintf("wit_svid.%d.token", i), []byte(row.Token), 0o600})
				}
				return tokenResult(rows, files, flags.write != ""), nil
			})
		},
	}
	flags.register(c)
	c.Flags().StringVar(&id, "spiffe-id", "", "only this identity")
	return c
}

func fetchBundleCommand() *cobra.Command {
	var flags fetchFlags
	var kind string
	c := &cobra.Command{
		Use:     "bundle",
		Short:   "Fetch the trust bundles this process may verify peers with",
		Example: "  entente fetch bundle --kind jwt --write /run/myapp",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			switch kind {
			case "x509":
				return watchStream(c, &flags, func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) (grpc.ServerStreamingClient[workload.X509BundlesResponse], error) {
					return api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
				}, readX509Bundles)
			case "jwt":
				return watchStream(c, &flags, func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) (grpc.ServerStreamingClient[workload.JWTBundlesResponse], error) {
					return api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
				}, func(response *workload.JWTBundlesResponse) (result, error) {
					return readKeySets(response.GetBundles(), "jwt")
				})
			case "wit":
				return watchStream(c, &flags, func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) (grpc.ServerStreamingClient[workload.WITBundlesResponse], error) {
					return api.FetchWITBundles(ctx, &workload.WITBundlesRequest{})
				}, func(response *workload.WITBundlesResponse) (result, error) {
					sets := map[string][]byte{}
					for td, set := range response.GetBundles() {
						sets[td] = []byte(set)
					}
					return readKeySets(sets, "wit")
				})
			}
			return usageError{c, fmt.Errorf("--kind %q is none of x509, jwt, wit", kind)}
		},
	}
	flags.register(c)
	c.Flags().StringVar(&kind, "kind", "x509", "what it verifies: x509, jwt or wit")
	return c
}

// domainName is the name in spiffe://NAME, fit for a file.
func domainName(id string) (string, error) {
	name := strings.TrimPrefix(id, "spiffe://")
	if name == "" || strings.HasPrefix(name, ".") || strings.ContainsAny(name, "/\\") {
		return "", fmt.Errorf("%q is no trust domain", id)
	}
	return name, nil
}

type bundleRow struct {
	domain string
	keys   int
}

func bundleTable(rows []bundleRow, what string) func(io.Writer) {
	return func(w io.Writer) {
		fmt.Fprintf(w, "TRUST DOMAIN\t%s\n", what)
		for _, row := range rows {
			fmt.Fprintf(w, "%s\t%d\n", row.domain, row.keys)
		}
	}
}

func readX509Bundles(response *workload.X509BundlesResponse) (r result, err error) {
	document := map[string]string{}
	var rows []bundleRow
	for _, id := range slices.Sorted(maps.Keys(response.GetBundles())) {
		name, err := domainName(id)
		if err != nil {
			return r, err
		}
		authorities, err := x509.ParseCertificates(response.GetBundles()[id])
		if err != nil {
			return r, fmt.Errorf("the bundle of %s cannot be read: %w", name, err)
		}
		text := certificatesPEM(authorities)
		document[name] = string(text)
		rows = append(rows, bundleRow{name, len(authorities)})
		r.files = append(r.files, file{name + ".pem", text, 0o644})
	}
	r.json, r.table = struct {
		Bundles map[string]string `json:"bundles"` // PEM
	}{document}, bundleTable(rows, "AUTHORITIES")
	return r, nil
}

func readKeySets(sets map[string][]byte, kind string) (r result, err error) {
	document := map[string]json.RawMessage{}
	var rows []bundleRow
	for _, id := range slices.Sorted(maps.Keys(sets)) {
		name, err := domainName(id)
		if err != nil {
			return r, err
		}
		var set struct {
			Keys []json.RawMessage `json:"keys"`
		}
		if err := json.Unmarshal(sets[id], &set); err != nil {
			return r, fmt.Errorf("the keys of %s cannot be read: %w", name, err)
		}
		document[name] = sets[id]
		rows = append(rows, bundleRow{name, len(set.Keys)})
		r.files = append(r.files, file{name + "." + kind + ".json", sets[id], 0o644})
	}
	r.json, r.table = struct {
		Bundles map[string]json.RawMessage `json:"bundles"` // JWK Sets
	}{document}, bundleTable(rows, "KEYS")
	return r, nil
}
